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


@contextmanager
def guarded() -> Iterator[GuardedStream | None]:
    """In the body of the `with` statement a standard output that takes no more raises `OutputError`, and one that nobody
    reads any more BrokenPipeError. Standard error that takes no more is done without.

    :return: the guarded standard output; None where there is none
    """
    before = sys.stdout, sys.stderr
    out = None if sys.stdout is None else GuardedStream(sys.stdout, _refuse)
    try:
        if out is not None:
            sys.stdout = out
        if sys.stderr is not None:
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
