"""What a guest does wrong, told in the host's log so that no guest can fill it."""

import logging


class Complaints:
    """Tells the first of them, the second, the fourth, the eighth and so on, each with how many were left out before it: no guest
    lives long enough to have 64 told.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._told = self._count = 0

    def tell(self, text: str) -> None:
        """The guest did something wrong. `text` says what, in one line whose length is bounded."""
        self._count += 1
        if self._count & self._count - 1:
            return
        left_out = self._count - self._told - 1
        self._told = self._count
        self._log.warning("%s%s", text, f" ({left_out} more since this was told last)" if left_out else "")
