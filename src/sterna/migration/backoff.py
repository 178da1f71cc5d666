"""A pause between short passes, in which the guest runs: exponential backoff."""

from dataclasses import dataclass

_SHORT_SECONDS = 0.05
_AT_ONCE = 8
"""So many short passes in a row follow without a wait: as many as `adaptive` polishes with."""
_FIRST_SECONDS = 0.001
_LONGEST_SECONDS = 0.1


@dataclass
class Backoff:
    """How long the guest runs between two passes: no time, until several short passes in a row have left pages.

    A guest that writes a little all the time never fits a limit that is small enough. Passes without pause would take a
    processor from it, and make nothing better.
    """

    _short: int = 0

    def after_pass(self, seconds: float) -> float:
        """A pass has ended that took so long.

        :return: seconds to wait before the next
        """
        self._short = self._short + 1 if seconds < _SHORT_SECONDS else 0
        if self._short <= _AT_ONCE:
            return 0.0
        doublings = min(self._short - _AT_ONCE - 1, 16)
        return float(min(_FIRST_SECONDS * 2**doublings, _LONGEST_SECONDS))
