"""The output of guests on their serial lines, with the time of each piece."""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

_CHUNK = 1 << 16
_LIMIT = 64 << 20


@dataclass(frozen=True)
class Line:
    """One line of output, without its end.

    :ivar arrived: CLOCK_MONOTONIC in seconds when its end was read
    """

    text: str
    arrived: float


class Console:
    """Reads a serial line from a pipe, on a thread of its own, until it ends.

    :ivar fd: the end that a VM writes to; `give_away` closes it here

    :raise OSError: When there can be no pipe.
    :raise RuntimeError: When the host has no thread to spare.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[bytes, float]] = []
        self._size = 0
        self._changed = threading.Condition()
        self._ended = False
        with ExitStack() as opened:
            self._read_fd, self.fd = os.pipe2(os.O_CLOEXEC)
            opened.callback(os.close, self._read_fd)
            opened.callback(os.close, self.fd)
            self._thread = threading.Thread(target=self._read, name="console", daemon=True)
            self._thread.start()
            opened.pop_all()  # the thread closes the one, `give_away` the other

    def give_away(self) -> None:
        """The VM has its own copy now. Does nothing the second time."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def pieces(self) -> list[tuple[bytes, float]]:
        """What was read, each with the time it came."""
        with self._changed:
            return list(self._pieces)

    def text(self) -> str:
        """All of it."""
        return b"".join(data for data, _ in self.pieces()).decode(errors="replace")

    def wait_quiet(self, seconds: float, timeout: float) -> None:
        """Wait until nothing has come for so long, or the line has ended."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._ended and time.monotonic() < deadline:
                if not self._changed.wait(seconds):
                    return

    def close(self) -> None:
        """Read what is left, once no VM has the other end. Does nothing the second time."""
        self.give_away()
        self._thread.join(5.0)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._read_fd, _CHUNK)
            except OSError:
                data = b""
            now = time.monotonic()
            with self._changed:
                if not data:
                    self._ended = True
                    self._changed.notify_all()
                    break
                if self._size < _LIMIT:  # a guest that floods its line is not kept whole
                    self._pieces.append((data, now))
                    self._size += len(data)
                self._changed.notify_all()
        os.close(self._read_fd)


def join_lines(consoles: Sequence[Console]) -> list[Line]:
    """The lines of a guest that has moved from each of these VMs to the next: a line may begin on one and end on another.

    What follows the last line's end is left out.
    """
    lines: list[Line] = []
    kept = bytearray()
    for console in consoles:
        for data, arrived in console.pieces():
            kept += data
            *whole, rest = kept.split(b"\n")
            kept = bytearray(rest)
            lines += [Line(line.decode(errors="replace").rstrip("\r"), arrived) for line in whole]
    return lines
