"""Cancellation that wakes every wait: an eventfd that is polled beside the channel's own descriptor."""

import os
import select
import threading
from types import TracebackType

from sterna.migration.errors import Cancelled


class Cancellation:
    """A flag with a file descriptor. Any thread may set it; nothing clears it.

    The file descriptor polls readable once set, so that a wait for a peer ends at once.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._set = False
        self._closed = False

    def fileno(self) -> int:
        """The descriptor to poll for POLLIN."""
        return self._fd

    @property
    def is_set(self) -> bool:
        """Whether `set` was called."""
        return self._set

    def set(self) -> None:
        """Cancel: every wait ends with `Cancelled`, now and later."""
        self._set = True
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._fd, 1)

    def check(self) -> None:
        """
        :raise Cancelled: When `set` was called.
        """
        if self._set:
            raise Cancelled("migration cancelled")

    def sleep(self, seconds: float) -> None:
        """Wait so long.

        :raise Cancelled: When `set` was called, before or meanwhile.
        """
        self.check()
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        # poll rounds up to milliseconds; a paced sender keeps a schedule, so that does not add up.
        poll.poll(max(0.0, seconds) * 1000)
        self.check()

    def close(self) -> None:
        """Give the descriptor back. No thread may be waiting."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)

    def __enter__(self) -> "Cancellation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
