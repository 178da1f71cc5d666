"""The policy `deadline`: as `adaptive`, and within so many seconds or not at all.

The throttle is also raised when the passes to come, each shorter than the last by the same ratio, would not be over in time. What
cannot be in time is given up as soon as that is certain, with the reason; the guest goes on at the source.
"""

import math
from dataclasses import replace

from sterna.migration.parameters import PolicyType
from sterna.migration.policies.adaptive import Adaptive
from sterna.migration.policy import (
    Continue,
    ConvergenceState,
    Decision,
    GiveUp,
    PassProgress,
    Policy,
    SwitchOver,
)
from sterna.migration.verdict import explain

_MARGIN = 0.9
"""Share of the time left that is planned for."""
_CERTAIN = 1.5
"""A pass that needs so many times what is left cannot be in time."""
_LEAST_ELAPSED = 0.5


class Deadline(Policy):
    """One migration's policy.

    :param seconds: from the start of the migration to the stop of the guest
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._adaptive = Adaptive()
        self._throttle = 0

    def after_pass(self, state: ConvergenceState) -> Decision:
        left = self._seconds - state.elapsed_seconds
        decision = self._adaptive.after_pass(state)
        if isinstance(decision, SwitchOver):
            return decision
        if state.fits and state.rest_seconds > left * _MARGIN:
            return SwitchOver()
        if state.rest_seconds > left:
            return GiveUp(f"the deadline of {self._seconds:g} s cannot be kept: {explain(state)}")
        assert isinstance(decision, Continue)
        if not state.fits:
            self._throttle = max(self._throttle, self._needed(state, left * _MARGIN))
        throttle = max(decision.throttle_percent, self._throttle)
        return replace(decision, throttle_percent=min(throttle, state.limits.throttle_percent))

    def during_pass(self, progress: PassProgress) -> GiveUp | None:
        left = self._seconds - progress.elapsed_seconds
        needed = progress.remaining_bytes / progress.bytes_per_second if progress.bytes_per_second else 0.0
        if left <= 0 or (progress.elapsed_seconds >= _LEAST_ELAPSED and needed > left * _CERTAIN):
            return GiveUp(
                f"the deadline of {self._seconds:g} s cannot be kept: pass {progress.number} has "
                f"{progress.remaining_bytes / 1e6:.0f} MB to go at {progress.bytes_per_second / 1e6:.1f} MB/s"
            )
        return None

    @staticmethod
    def _needed(state: ConvergenceState, seconds: float) -> int:
        """The least throttle with which the passes to come should be over in so many seconds."""
        target = max(state.limits.downtime_seconds * 1000 - state.other_ms, 1.0)
        shrink = min(target / max(state.pages_ms, 1e-3), 1.0)
        now = state.last.throttle_percent
        for percent in range(now, 100):
            ratio = state.ratio * (100 - percent) / (100 - now)
            if ratio < 1 and state.rest_seconds * _sum_of_passes(ratio, shrink) <= seconds:
                return percent
        return 99


def _sum_of_passes(ratio: float, shrink: float) -> float:
    """How long passes take in all, in units of the first, until one leaves `shrink` of what the first sends."""
    if ratio <= 0:
        return 1.0
    count = max(1, math.ceil(math.log(shrink) / math.log(ratio)))
    return float((1 - ratio**count) / (1 - ratio))


POLICY = PolicyType(
    "deadline",
    lambda parameters: Deadline(parameters.number("x-sterna-deadline")),
    argument="x-sterna-deadline",
    unit="seconds",
)
