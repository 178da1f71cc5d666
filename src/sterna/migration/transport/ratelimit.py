"""Pacing a sender to a number of bytes per second.

The limiter keeps a debt: what was sent adds to it, time takes it off at the rate, and only who owes nothing may send. A sender
that falls behind (it waited for the network, or overslept) may catch up by at most `CATCH_UP_SECONDS` of data. So over any second
no more than the limit, that share and one piece passes, and, as long as the sender has data, no less than the limit.
"""

import threading
import time
from collections.abc import Callable

import numpy as np

from sterna.memory.vectors import Vectors

CATCH_UP_SECONDS = 0.03
PIECE_SECONDS = 0.005
"""A piece should take about so long at the limit: pieces of a whole second could not be paced within one."""
_LONGEST_SLEEP = 0.05
"""A new limit takes effect within so many seconds."""


class RateLimiter:
    """Paces one sender. `rate` may be set by another thread while it runs.

    :param rate: bytes per second; 0 is unlimited
    :param clock: monotonic time in seconds
    :param sleep: waits so many seconds; whatever it raises (a cancellation) passes through

    :ivar waited_seconds: how long senders have waited in all
    """

    def __init__(
        self,
        rate: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        # Bytes sent ahead of the rate, as of the time; below 0 what may still be caught up.
        self._debt = 0.0
        self._at = clock()
        self.waited_seconds = 0.0

    @property
    def rate(self) -> int:
        """Bytes per second; 0 is unlimited."""
        return self._rate

    @rate.setter
    def rate(self, rate: int) -> None:
        with self._lock:
            self._settle()  # what has passed went by at the old rate
            self._rate = rate

    def piece_bytes(self, smallest: int, largest: int) -> int:
        """How many bytes to send at once, between the two limits."""
        rate = self._rate
        if rate == 0:
            return largest
        return max(smallest, min(largest, int(rate * PIECE_SECONDS)))

    def pace(self, size: int) -> None:
        """Wait until `size` more bytes may be sent, and count them as sent."""
        started: float | None = None
        while True:
            with self._lock:
                self._settle()
                if started is None:
                    started = self._at
                if self._debt < 1:
                    self._debt += size if self._rate else 0
                    self.waited_seconds += self._at - started
                    return
                wait = self._debt / self._rate
            self._sleep(min(wait, _LONGEST_SLEEP))

    def _settle(self) -> None:
        now = self._clock()
        if self._rate:
            self._debt = max(self._debt - (now - self._at) * self._rate, -CATCH_UP_SECONDS * self._rate)
        else:
            self._debt = 0.0
        self._at = now


def cut(vectors: Vectors, size: int) -> tuple[Vectors, Vectors]:
    """Cut a gather list after `size` bytes, in the middle of a piece of memory where it must be.

    :param size: at least 1
    :return: what comes before, and the rest, which may be empty
    """
    ends = np.cumsum(vectors[:, 1], dtype=np.int64)
    if not ends.size or int(ends[-1]) <= size:
        return vectors, vectors[:0]
    row = int(np.searchsorted(ends, size, side="left"))
    over = np.uint64(int(ends[row]) - size)
    head, rest = vectors[: row + 1].copy(), vectors[row + (over == 0) :].copy()
    head[row, 1] -= over
    if over:
        rest[0] = head[row, 0] + head[row, 1], over
    return head, rest
