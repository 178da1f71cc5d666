"""What a policy is told after each pass, and what it may answer.

A policy sees numbers only: no clock, no channel, no guest. So every policy can be tried on passes that were recorded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sterna.memory.address import PAGE_SIZE
from sterna.migration.statistics import DowntimeParts, Pass


@dataclass(frozen=True)
class Limits:
    """What the user allows.

    :ivar downtime_seconds: how long the guest may stand still
    :ivar throttle_percent: how much of its time may be taken from it; 0 is none
    """

    downtime_seconds: float
    throttle_percent: int = 0


@dataclass(frozen=True)
class ConvergenceState:
    """Where a migration is after a pass.

    :ivar passes: the passes so far, or the last thousand; at least one, the latest last
    :ivar rest_bytes: what the dirty pages are expected to take on the wire as they are encoded now
    :ivar rest_seconds: how long the next pass, which sends them, is expected to take while the guest runs
    :ivar whole_seconds: how long it would take if all its pages were sent whole
    :ivar bytes_per_second: what goes through while the guest runs, its limit included; 0 while unknown
    :ivar predicted: the downtime if the guest stopped now, by part, in ms
    :ivar elapsed_seconds: since the migration was started
    """

    passes: Sequence[Pass]
    rest_bytes: float
    rest_seconds: float
    whole_seconds: float
    bytes_per_second: float
    predicted: DowntimeParts
    elapsed_seconds: float
    limits: Limits

    @property
    def last(self) -> Pass:
        return self.passes[-1]

    @property
    def dirty_pages(self) -> int:
        """Pages that are to be sent."""
        return self.last.dirty_pages

    @property
    def page_bytes(self) -> float:
        """What a dirty page costs on the wire."""
        return self.rest_bytes / self.dirty_pages if self.dirty_pages else float(PAGE_SIZE)

    @property
    def dirty_bytes_per_second(self) -> float:
        """What the guest makes to be sent, as it is encoded now."""
        return self.rest_bytes / self.last.seconds if self.last.seconds else 0.0

    @property
    def ratio(self) -> float:
        """How much longer or shorter the next pass will be than this one: below 1 the migration converges."""
        return self.rest_seconds / self.last.seconds if self.last.seconds else 0.0

    @property
    def pages_ms(self) -> float:
        """The predicted downtime's part that shrinks with the number of dirty pages."""
        return max(0.0, self.predicted.last_pass - LAST_PASS_MS)

    @property
    def other_ms(self) -> float:
        """The predicted downtime's other parts."""
        return self.predicted.total - self.pages_ms

    @property
    def fits(self) -> bool:
        """Whether the downtime is predicted to stay within its limit.

        A limit that is less than everything else takes leaves a tenth of it for pages: such a migration ends, though late.
        """
        limit_ms = self.limits.downtime_seconds * 1000
        return self.pages_ms <= max(limit_ms - self.other_ms, limit_ms * LEAST_SHARE)


LAST_PASS_MS = 2.5
"""What the last pass takes with nothing in it."""
LEAST_SHARE = 0.1
"""Share of the downtime limit that is left for pages when everything else would use it up."""


@dataclass(frozen=True)
class Continue:
    """Another pass.

    :ivar throttle_percent: how much of its time is to be taken from the guest
    :ivar verdict: why the migration is not expected to converge; empty when it is
    :ivar encode: whether pages are worth encoding; once they are not, they are sent whole to the end
    """

    throttle_percent: int = 0
    verdict: str = ""
    encode: bool = True


@dataclass(frozen=True)
class SwitchOver:
    """Stop the guest, send the rest and hand over."""


@dataclass(frozen=True)
class GiveUp:
    """End the migration; the guest goes on here.

    :ivar reason: one line for the user
    """

    reason: str


Decision = Continue | SwitchOver | GiveUp


@dataclass(frozen=True)
class PassProgress:
    """Where a migration is within a pass.

    :ivar number: of the pass
    :ivar remaining_bytes: of the pass, at what its pages took so far
    :ivar bytes_per_second: what goes through; 0 while unknown
    """

    number: int
    elapsed_seconds: float
    remaining_bytes: float
    bytes_per_second: float


class Policy(Protocol):
    """Decides how one migration goes on."""

    def after_pass(self, state: ConvergenceState) -> Decision:
        """A pass has ended while the guest runs."""
        ...

    def during_pass(self, progress: PassProgress) -> GiveUp | None:
        """Asked now and then while a pass is sent: go on, or give up?"""
        return None
