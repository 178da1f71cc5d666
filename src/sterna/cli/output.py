"""Standard output and standard error of a command, which may be full or closed while it runs."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sterna.cli.errors import CliError


class OutputError(CliError):
    """Standard output takes no more."""


class GuardedStream:
    """A stream whose writes fail as its owner wants. Everything else is the stream's own.

    :ivar used: something was written
    """

    def __init__(self, stream: Any, failed: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._failed = failed
        self.used = False

    def write(self, data: Any) -> int:
        try:
            count = int(self._stream.write(data))
        except OSError as error:
            self._failed(error)
            return len(data)
        self.used = self.used or bool(data)
        return count

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    @property
    def buffer(self) -> "GuardedStream":
        """The stream of bytes below a text stream."""
        return GuardedStream(self._stream.buffer, self._failed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_closed_streams() -> None:
    """Standard streams that are closed lead to /dev/null from now on. A file or socket that is opened later would get their
    number, and what is meant for standard output would go there.
    """
    for fd, mode in enumerate("rww"):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number, which is this one. Commands that are started inherit it as the rest.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(
                sys, ("stdin", "stdout", "stderr")[fd], os.fdopen(fd, mode, encoding="utf-8", closefd=False)
            )


@contextmanager
def guarded() -> Iterator[GuardedStream]:
    """In the body of the `with` statement a standard output that takes no more raises `OutputError`, and one that nobody
    reads any more BrokenPipeError. Standard error that takes no more is done without.

    :return: the guarded standard output
    """
    before = sys.stdout, sys.stderr
    out = GuardedStream(sys.stdout, _refuse)
    try:
        sys.stdout = out
        sys.stderr = GuardedStream(sys.stderr, lambda error: None)
        yield out
    finally:
        sys.stdout, sys.stderr = before


def _refuse(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise error
    raise OutputError(f"standard output: {error.strerror}") from error


def discard_output() -> None:
    """What is still in standard output's buffer goes nowhere, and not once more to what refused it when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
    finally:
        os.close(null)
