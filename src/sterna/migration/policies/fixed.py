"""The policy `fixed`: QEMU 7.2's rules.

The guest stops when the dirty pages, counted at their full size, would go through within the downtime limit at the
bandwidth that was measured last. With the capability `auto-converge` it is slowed down by fixed steps while it
dirties memory too fast: a pass in which the guest dirtied more than `throttle-trigger-threshold` percent of what was
sent counts; every second one raises the throttle, from `cpu-throttle-initial` by `cpu-throttle-increment` up to `max-
cpu-throttle`.
"""

from dataclasses import dataclass

from sterna.memory.address import PAGE_SIZE
from sterna.migration.parameters import Parameters, PolicyType
from sterna.migration.policy import Continue, ConvergenceState, Decision, Policy, SwitchOver
from sterna.migration.verdict import verdict

_PASSES_PER_STEP = 2


@dataclass
class AutoConverge:
    """Decides how much of their time the vCPUs are kept from running.

    :ivar percent: the throttle now; 0 is off
    """

    parameters: Parameters
    percent: int = 0
    _high_passes: int = 0

    def after_pass(self, sent_bytes: int, dirtied_bytes: int) -> int:
        """The throttle for the next pass, after one that sent and in which the guest dirtied so much.

        :return: percent of its time that each vCPU is to stand still
        """
        if not self.parameters.has("auto-converge"):
            self.percent = 0
            return 0
        threshold = sent_bytes * self.parameters.number("throttle-trigger-threshold") / 100
        if dirtied_bytes > threshold:
            self._high_passes += 1
            if self._high_passes >= _PASSES_PER_STEP:
                self._high_passes = 0
                self.percent = self._raised(threshold, dirtied_bytes)
        return self.percent

    def _raised(self, threshold: float, dirtied_bytes: int) -> int:
        if not self.percent:
            return self.parameters.number("cpu-throttle-initial")
        step = self.parameters.number("cpu-throttle-increment")
        if self.parameters.number("cpu-throttle-tailslow"):
            # No further than to where the guest would dirty just as much as the threshold.
            running = 100 - self.percent
            step = min(step, round(running - running * threshold / dirtied_bytes))
        return min(self.percent + step, self.parameters.number("max-cpu-throttle"))


class Fixed(Policy):
    """QEMU's rules, one migration's worth of them."""

    def __init__(self, parameters: Parameters) -> None:
        self._auto_converge = AutoConverge(parameters)

    def after_pass(self, state: ConvergenceState) -> Decision:
        dirty_bytes = state.dirty_pages * PAGE_SIZE
        if dirty_bytes <= state.bytes_per_second * state.limits.downtime_seconds:
            return SwitchOver()
        throttle = self._auto_converge.after_pass(state.last.bytes, dirty_bytes)
        return Continue(throttle, verdict(state))


POLICY = PolicyType("fixed", Fixed, own=False)
