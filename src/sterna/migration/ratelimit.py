"""Pacing a sender to a number of bytes per second.

The limiter keeps a schedule: each piece moves the time of the next one by its own duration at the limit. A
sender that falls behind (it waited for the network, or overslept) may catch up by at most `CATCH_UP_SECONDS`
of data. So over any second no more than the limit plus that share passes, and, as long as the sender has
data, no less than the limit.
"""

import time
from collections.abc import Callable

CATCH_UP_SECONDS = 0.02
PIECE_SECONDS = 0.01
"""A piece should take about so long at the limit: pieces of a whole second could not be paced within one."""


class RateLimiter:
    """Paces one sender. `rate` may be set by another thread while it runs.

    :param rate: bytes per second; 0 is unlimited
    :param clock: monotonic time in seconds
    :param sleep: waits so many seconds; whatever it raises (a cancellation) passes through
    """

    def __init__(
        self,
        rate: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.rate = rate
        self._clock = clock
        self._sleep = sleep
        self._next: float | None = None

    def piece_bytes(self, smallest: int, largest: int) -> int:
        """How many bytes to send at once, between the two limits."""
        if self.rate == 0:
            return largest
        return max(smallest, min(largest, int(self.rate * PIECE_SECONDS)))

    def pace(self, size: int) -> None:
        """Wait until `size` more bytes may be sent, and count them as sent."""
        rate = self.rate
        if rate == 0:
            self._next = None
            return
        now = self._clock()
        due = now if self._next is None else max(self._next, now - CATCH_UP_SECONDS)
        self._next = due + size / rate
        while now < due:
            # A lower or lifted limit takes effect at the next piece; waits are short because pieces are.
            self._sleep(due - now)
            now = self._clock()
