"""What the process of a VM says on standard error: nobody waits for whoever reads it, and no peer or guest can fill it."""

import logging
import os
import select
import threading
from collections import defaultdict

from sterna.host.printable import printable
from sterna.host.ratelimitedlog import RateLimitedLog

_FREELY = 8
_PIECE_BYTES = select.PIPE_BUF
"""A write of so many to a pipe that polls as writable does not block (POSIX, write)."""


class StderrLog(logging.Handler):
    """:param descriptor: where lines go; what it does not take at once is dropped, and told when it takes something again"""

    def __init__(self, descriptor: int = 2) -> None:
        super().__init__(logging.WARNING)
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._telling = threading.Lock()
        self._dropped = 0
        self._rate_limited: defaultdict[str, RateLimitedLog] = defaultdict(
            lambda: RateLimitedLog(self._say, _FREELY)
        )

    def tell(self, text: str, *, lines: bool = False) -> None:
        """Say something. Never blocks and never raises.

        :param lines: ends of lines in it stay
        """
        self._say(printable(text, lines=lines))

    def tell_rate_limited(self, kind: str, text: str, *, lines: bool = False) -> None:
        """As `tell`, what a peer or a guest can have said any number of times: after `_FREELY` of a kind only some are told."""
        self._rate_limited[kind].tell(printable(text, lines=lines))

    def emit(self, record: logging.LogRecord) -> None:
        """What is logged is of a kind by its format. Less than a warning comes only when the user has asked for all of it."""
        if record.levelno < logging.WARNING:
            self.tell(self.format(record))
        else:
            self.tell_rate_limited(str(record.msg), self.format(record), lines=record.exc_info is not None)

    def _say(self, text: str) -> None:
        with self._telling:
            before = f"sterna: {self._dropped} messages could not be written here\n" if self._dropped else ""
            written = self._write(f"{before}sterna: {text}\n".encode())
            self._dropped = 0 if written else self._dropped + 1

    def _write(self, data: bytes) -> bool:
        while data:
            if not self._poll.poll(0):
                return False
            try:
                data = data[os.write(self._descriptor, data[:_PIECE_BYTES]) :]
            except BlockingIOError:  # whoever gave us the descriptor has it so
                return False
            except OSError:  # nobody will read it any more
                return True
        return True
