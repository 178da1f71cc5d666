"""What a program tells of its work: on standard error, and in a file."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from sterna.host.printable import printable

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_IN_A_FILE = "%(asctime)s %(process)d %(threadName)s %(levelname)s %(name)s: %(message)s"

_own = logging.getLogger("sterna")
_others = logging.getLogger()


class _Formatter(logging.Formatter):
    """Escapes texts of others, so that none can pass for a line of this program."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=record.exc_info is not None)


class _Chosen:
    """What the user wants to be told: one for the process, which has one standard error.

    :ivar level: on standard error
    :ivar path: of the file; empty when there is none
    """

    level = logging.WARNING
    path = ""
    console: logging.Handler | None = None
    file: "logging.StreamHandler[TextIO] | None" = None


def start(verbosity: int, path: str | None) -> None:
    """Tell from now on.

    :param verbosity: on standard error: 0 only warnings, 1 what happens, 2 everything
    :param path: a file that everything is added to; None: none
    :raise OSError: When it cannot be written.
    """
    if path is not None:
        # A named pipe that nobody reads is an error, and is not waited for.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        stream: TextIO = open(os.open(path, flags, 0o666), "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        file = logging.StreamHandler(stream)
        file.setFormatter(_Formatter(_IN_A_FILE))
        _own.addHandler(file)
        _Chosen.file, _Chosen.path = file, os.path.abspath(path)
    _Chosen.level = _LEVELS[min(verbosity, len(_LEVELS) - 1)]
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(_Chosen.level)
    console.setFormatter(_Formatter("sterna: %(message)s"))
    _others.addHandler(console)
    _Chosen.console = console
    _own.setLevel(logging.DEBUG if path is not None else _Chosen.level)


def stop() -> None:
    """Tell nothing more. Does nothing when nothing was told."""
    if _Chosen.console is not None:
        _others.removeHandler(_Chosen.console)
    if _Chosen.file is not None:
        _own.removeHandler(_Chosen.file)
        _Chosen.file.stream.close()
    _Chosen.console = _Chosen.file = None
    _Chosen.level, _Chosen.path = logging.WARNING, ""
    _own.setLevel(logging.NOTSET)


@contextmanager
def told_by(handler: logging.Handler) -> Iterator[None]:
    """In the body of the `with` statement `handler` tells what is meant for standard error."""
    handler.setLevel(_Chosen.level)
    if _Chosen.console is not None:
        _others.removeHandler(_Chosen.console)
    _others.addHandler(handler)
    try:
        yield
    finally:
        _others.removeHandler(handler)
        if _Chosen.console is not None:
            _others.addHandler(_Chosen.console)


def arguments() -> list[str]:
    """For a sterna that this one starts: it writes to the same file. What its standard error has is another matter."""
    return ["--log-file", _Chosen.path] if _Chosen.path else []
