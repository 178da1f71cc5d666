"""Warnings about what a guest or a peer does wrong, at a falling rate: neither can fill a log."""

from collections.abc import Callable


class RateLimitedLog:
    """Writes the first warning, the second, the fourth, the eighth and so on, each with how many were left out before it: 2^64
    warnings make 65 lines.

    :param tell: takes a line
    :param freely: so many are told in any case, then each time that there are twice as many
    """

    def __init__(self, tell: Callable[[str], object], freely: int = 1) -> None:
        self._tell = tell
        self._freely = freely
        self._told = self._count = 0

    def tell(self, text: str) -> None:
        """Somebody did something wrong. `text` says what, in one line whose length is bounded."""
        self._count += 1
        times, rest = divmod(self._count, self._freely)
        if self._count > self._freely and (rest or times & times - 1):
            return
        left_out = self._count - self._told - 1
        self._told = self._count
        self._tell(f"{text} ({left_out} more since this was told last)" if left_out else text)
