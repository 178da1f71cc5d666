"""How far a migration is, how long it will take, and whether it will end, from what query-migrate answers.

Works on QEMU's fields alone, so also for a QEMU; whether it converges a sterna's policy knows better. The fraction is
of stages, not of bytes: pass 1, which sends all of RAM, is its first `_FIRST_PASS`; then the logarithm of what
remains runs down to what fits the downtime limit. It never runs backwards. A migration that does not converge stands
still.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FIRST_PASS = 0.70
_PASSES_END = 0.95
_LEAST_RATE = 1.0
_LOSING = 0.9
"""A pass that leaves this much of what it sent dirty gains nothing."""


@dataclass(frozen=True)
class Picture:
    """A migration at one moment.

    :ivar fraction: 0 to 1, never less than before
    :ivar remaining: bytes
    :ivar dirty_rate: bytes/s, as of the last look at the dirty log; None before the first
    :ivar transfer_rate: bytes/s
    :ivar eta_seconds: until switchover, in pass 1 until its end, at the `transfer_rate`; None while unknown or never
    :ivar throttle_percent: how much of its time auto-converge takes from the guest
    :ivar converges: None until the dirty rate was measured
    :ivar expected_downtime_ms: if the guest stopped now, as of the last look at the dirty log
    :ivar verdict: why it does not converge, and what would do
    """

    status: str
    fraction: float
    pass_number: int
    remaining: int
    total: int
    transferred: int
    dirty_rate: float | None
    transfer_rate: float
    eta_seconds: float | None
    converges: bool | None
    expected_downtime_ms: int | None
    throttle_percent: int
    verdict: str = ""


class ProgressTracker:
    """Follows one migration.

    :param downtime_limit_ms: the parameter `downtime-limit`
    """

    def __init__(self, downtime_limit_ms: int) -> None:
        self._limit_seconds = downtime_limit_ms / 1000
        self._fraction = 0.0
        self._pass = 0
        self._pass_start = 0
        self._second_pass_start = 0
        self._left = 0.0

    def update(self, info: Mapping[str, Any]) -> Picture:
        """:param info: as query-migrate answers"""
        ram = info.get("ram", {})
        status = str(info.get("status", "none"))
        number = int(ram.get("dirty-sync-count", 0))
        remaining = int(ram.get("remaining", 0))
        total = int(ram.get("total", 0))
        if number != self._pass:
            self._left = self._left_by_last_pass(info, number, remaining)
            self._pass, self._pass_start = number, remaining
            if number == 2:
                self._second_pass_start = remaining
        self._pass_start = max(self._pass_start, remaining)
        transfer = float(ram.get("mbps", 0.0)) * 1e6 / 8
        dirty = float(ram.get("dirty-pages-rate", 0)) * int(ram.get("page-size", 4096))
        threshold = max(transfer * self._limit_seconds, 1.0)
        known = number >= 2 and transfer > _LEAST_RATE
        ratio = max(dirty / transfer, self._left) if known else 0.0
        converges = (ratio < _LOSING or self._pass_start <= threshold) if known else None
        own = info.get("x-sterna", {})
        verdict = str(own.get("verdict") or "")
        if known and own.get("policy"):
            converges = not verdict
            ratio = min(ratio, _LOSING - 0.1) if converges else ratio
        eta = None
        if status == "active" and transfer > _LEAST_RATE and (number == 1 or converges):
            eta = (remaining + self._later_passes(ratio, threshold)) / transfer
        fraction = self._stage(status, number, remaining, total, threshold, ratio)
        self._fraction = max(self._fraction, min(fraction, 1.0))
        downtime = info.get("expected-downtime")
        return Picture(
            status=status,
            fraction=self._fraction,
            pass_number=number,
            remaining=remaining,
            total=total,
            transferred=int(ram.get("transferred", 0)),
            dirty_rate=dirty if number >= 2 else None,
            transfer_rate=transfer,
            eta_seconds=eta,
            converges=converges,
            expected_downtime_ms=int(downtime) if downtime is not None else None,
            throttle_percent=int(info.get("cpu-throttle-percentage", 0)),
            verdict=verdict,
        )

    def _left_by_last_pass(self, info: Mapping[str, Any], number: int, remaining: int) -> float:
        """Of what the pass before `number` sent, how much its end found dirty; 0 when not known."""
        passes = info.get("x-sterna", {}).get("passes")
        if passes:
            return float(passes[-1]["dirty_pages_after"]) / max(int(passes[-1]["pages"]), 1)
        if number == self._pass + 1 and self._pass_start:
            return remaining / self._pass_start
        return 0.0

    def _later_passes(self, ratio: float, threshold: float) -> float:
        """Bytes of the passes after this one, each `ratio` times the one before, until what remains fits."""
        first = self._pass_start * ratio
        if first <= threshold or ratio >= _LOSING:
            return 0.0
        count = math.ceil(math.log(threshold / first) / math.log(ratio))
        return first * (1 - ratio**count) / (1 - ratio)

    def _stage(
        self, status: str, number: int, remaining: int, total: int, threshold: float, ratio: float
    ) -> float:
        if status == "completed":
            return 1.0
        if status == "device":
            return _PASSES_END
        if number <= 1:
            return _FIRST_PASS * (1 - remaining / total) if total and number else 0.0
        # Within a pass, from where it began to where the look at its end is expected to find us.
        begin = self._converged(self._pass_start, threshold)
        end = max(begin, self._converged(self._pass_start * ratio, threshold))
        done = 1 - remaining / self._pass_start if self._pass_start else 1.0
        return _FIRST_PASS + (_PASSES_END - _FIRST_PASS) * (begin + (end - begin) * done)

    def _converged(self, remaining: float, threshold: float) -> float:
        """0 at the start of pass 2, 1 where the rest fits the downtime."""
        if remaining <= threshold or self._second_pass_start <= threshold:
            return 1.0
        return max(0.0, 1 - math.log(remaining / threshold) / math.log(self._second_pass_start / threshold))
