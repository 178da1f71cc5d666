"""The policy `adaptive`: within the downtime limit in the shortest total time, and no longer a downtime than is cheap to avoid.

- The guest stops when the predicted downtime fits its limit. While passes still get shorter by a seventh and more, one more costs
  a migration of seconds little and shortens the downtime much; then it is taken.
- The guest is throttled only when passes show that they do not get shorter: then as much as should make the next pass
  `_AIM` of the last, and again if it did not. `x-sterna-max-throttle` bounds it, 0 forbids it.
- Pages are encoded as long as that makes passes shorter: it need not where the link is fast and the guest writes much.
- It never gives up by itself. What would have to change is said in a verdict.
"""

from sterna.migration.parameters import PolicyType
from sterna.migration.policy import Continue, ConvergenceState, Decision, Policy, SwitchOver
from sterna.migration.verdict import is_losing, verdict

_CHEAP = 0.85
"""A further pass is worth it up to this length, compared with the last."""
_GAIN_MS = 1.0
_GAIN_SHARE = 0.1
"""And if it saves so much downtime, and such a share of it."""
_POLISHING_PASSES = 8
_AIM = 0.6
_LEAST_STEP = 5


class Adaptive(Policy):
    """One migration's policy."""

    def __init__(self) -> None:
        self._polished = 0
        self._throttle = 0

    def after_pass(self, state: ConvergenceState) -> Decision:
        if state.fits:
            if self._polished < _POLISHING_PASSES and self._is_worth_another(state):
                self._polished += 1
                return Continue(self._throttle, encode=_is_encoding_worth_it(state))
            return SwitchOver()
        self._polished = 0
        if is_losing(state):
            self._throttle = max(self._throttle, self._raised(state))
        self._throttle = min(self._throttle, state.limits.throttle_percent)
        # With the new throttle it is expected to converge; only what cannot be helped is a verdict.
        helped = self._throttle > state.last.throttle_percent
        text = "" if helped else verdict(state)
        return Continue(self._throttle, text, _is_encoding_worth_it(state))

    @staticmethod
    def _is_worth_another(state: ConvergenceState) -> bool:
        gain = state.pages_ms * (1 - state.ratio)
        return state.ratio <= _CHEAP and gain >= max(_GAIN_MS, _GAIN_SHARE * state.predicted.total)

    @staticmethod
    def _raised(state: ConvergenceState) -> int:
        running = 100 - state.last.throttle_percent
        percent = 100 - round(running * _AIM / state.ratio)
        return min(max(percent, state.last.throttle_percent + _LEAST_STEP), state.limits.throttle_percent)


def _is_encoding_worth_it(state: ConvergenceState) -> bool:
    return state.last.number == 1 or state.rest_seconds <= state.whole_seconds


POLICY = PolicyType("adaptive", lambda parameters: Adaptive())
