"""Cancellation that wakes every wait: an eventfd that is polled beside the channel's own descriptor.

`Source.cancel` sets it, and at the destination the end of `Incoming`; what `check` raises then ends `Source.run` or
`Destination.run`.
A migration that works on several channels also ends the waits on the others by it when one of them fails.
"""

import os
import select
import threading

from sterna.host.closing import Closing
from sterna.migration.errors import Cancelled, ChannelError


class Cancellation(Closing):
    """A flag with a file descriptor. Any thread may set it; nothing clears it.

    The file descriptor polls readable once set, so that a wait for a peer ends at once.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._set = False
        self._failure: ChannelError | None = None
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
        self._wake()

    def fail(self, error: ChannelError) -> None:
        """A channel failed: every wait ends with this error, now and later, unless it is cancelled. The first error counts."""
        with self._lock:
            self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._fd, 1)

    def check(self) -> None:
        """
        :raise Cancelled: When `set` was called.
        :raise ChannelError: When `fail` was called.
        """
        if self._set:
            raise Cancelled("migration cancelled")
        if self._failure is not None:
            raise ChannelError(str(self._failure)) from self._failure

    def sleep(self, seconds: float) -> None:
        """Wait so long.

        :raise Cancelled: When `set` was called, before or meanwhile.
        :raise ChannelError: When `fail` was.
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
