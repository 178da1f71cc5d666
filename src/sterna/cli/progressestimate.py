"""How far a migration is, how long it will take, and whether it will end, from what query-migrate answers.

Works on QEMU's fields alone, so also for a QEMU; whether it converges a sterna's policy knows better. The fraction is
of stages, not of bytes: pass 1, which sends all of RAM, is its first `_FIRST_PASS`; then the logarithm of what
remains runs down to what fits the downtime limit. It never runs backwards. A migration that does not converge stands
still.

What remains is guest RAM, so all rates that forecasts are made of are those of guest RAM: pages that were dealt with, as
many bytes as they have there. What they took on the wire is another figure: a page that is zero takes nine bytes, one of
which little has changed a few hundred.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sterna.host.printable import printable

_FIRST_PASS = 0.70
_PASSES_END = 0.95
_LEAST_RATE = 1.0
_LOSING = 0.9
"""A pass that leaves this much of what it sent dirty gains nothing."""
_WINDOW_SECONDS = 3.0
"""What the rate of pages is a mean of."""
_FIRST_SECONDS = 1.0
"""So much has to be seen before anything is forecast."""


@dataclass(frozen=True)
class ProgressEstimate:
    """A migration at one moment.

    :ivar fraction: 0 to 1, never less than before
    :ivar remaining: bytes of guest RAM
    :ivar transferred: bytes of the stream
    :ivar dirty_rate: bytes of guest RAM per second, as of the last sync of the dirty log; None before the first
    :ivar page_rate: bytes of guest RAM per second that were dealt with, over the last seconds; None in the first
    :ivar wire_rate: bytes of the stream per second, as the VM says
    :ivar eta_seconds: until switchover, in pass 1 until its end, at the `page_rate`; None while unknown or never
    :ivar throttle_percent: how much of its time auto-converge takes from the guest
    :ivar converges: None until the rates were measured
    :ivar expected_downtime_ms: if the guest stopped now, as of the last sync of the dirty log; None before it was predicted
    :ivar verdict: why it does not converge, and what would do
    """

    status: str
    fraction: float
    pass_number: int
    remaining: int
    total: int
    transferred: int
    dirty_rate: float | None
    page_rate: float | None
    wire_rate: float
    eta_seconds: float | None
    converges: bool | None
    expected_downtime_ms: int | None
    throttle_percent: int
    verdict: str = ""


class ProgressEstimator:
    """Follows one migration.

    :param downtime_limit_ms: the parameter `downtime-limit`
    """

    def __init__(self, downtime_limit_ms: int) -> None:
        self._limit_ms = downtime_limit_ms
        self._fraction = 0.0
        self._pass = 0
        self._pass_start = 0
        self._second_pass_start = 0
        self._left = 0.0
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, info: Mapping[str, Any]) -> ProgressEstimate:
        """:param info: as query-migrate answers"""
        ram = info.get("ram", {})
        status = printable(str(info.get("status", "none")))
        number = int(ram.get("dirty-sync-count", 0))
        remaining = int(ram.get("remaining", 0))
        total = int(ram.get("total", 0))
        if number != self._pass:
            self._left = self._left_by_last_pass(info, number, remaining)
            self._pass, self._pass_start = number, remaining
            if number == 2:
                self._second_pass_start = remaining
        self._pass_start = max(self._pass_start, remaining)
        rate = self._page_rate(info) if number else None
        dirty = float(ram.get("dirty-pages-rate", 0)) * _page_bytes(info)
        threshold = max((rate or 0.0) * self._limit_ms / 1000, 1.0)
        ratio, converges = 0.0, None
        if number >= 2 and rate is not None and rate > _LEAST_RATE:
            ratio = max(dirty / rate, self._left)
            converges = ratio < _LOSING or self._pass_start <= threshold
        own = info.get("x-sterna", {})
        verdict = printable(str(own.get("verdict") or ""))
        if number >= 2 and own.get("policy"):
            converges = not verdict
            ratio = min(ratio, _LOSING - 0.1) if converges else ratio
        eta = None
        if status == "active" and rate is not None and rate > _LEAST_RATE and (number == 1 or converges):
            eta = (remaining + self._later_passes(ratio, threshold)) / rate
        fraction = self._stage(status, number, remaining, total, threshold, ratio)
        self._fraction = max(self._fraction, min(fraction, 1.0))
        return ProgressEstimate(
            status=status,
            fraction=self._fraction,
            pass_number=number,
            remaining=remaining,
            total=total,
            transferred=int(ram.get("transferred", 0)),
            dirty_rate=dirty if number >= 2 else None,
            page_rate=rate,
            wire_rate=float(ram.get("mbps", 0.0)) * 1e6 / 8,
            eta_seconds=eta,
            converges=converges,
            expected_downtime_ms=self._expected_downtime(info),
            throttle_percent=int(info.get("cpu-throttle-percentage", 0)),
            verdict=verdict,
        )

    def _page_rate(self, info: Mapping[str, Any]) -> float | None:
        """Of guest RAM, by the VM's own clock; None before `_FIRST_SECONDS` have been seen."""
        now, done = float(info.get("total-time", 0)) / 1000, _pages_done(info) * _page_bytes(info)
        seen = self._seen
        seen.append((now, done))
        while len(seen) > 2 and now - seen[1][0] >= _WINDOW_SECONDS:
            seen.popleft()
        seconds = now - seen[0][0]
        return (done - seen[0][1]) / seconds if seconds >= _FIRST_SECONDS else None

    def _expected_downtime(self, info: Mapping[str, Any]) -> int | None:
        """QEMU says its limit until it has made a prediction; a sterna says apart whether it has."""
        own, expected = info.get("x-sterna"), info.get("expected-downtime")
        if own is not None:
            expected = own.get("predicted-downtime-ms")
        elif expected == self._limit_ms:
            expected = None
        return None if expected is None else round(expected)

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
        if status in ("pre-switchover", "device"):
            return _PASSES_END
        if number <= 1:
            return _FIRST_PASS * (1 - remaining / total) if total and number else 0.0
        # Within a pass, from where it began to where the sync at its end is expected to find us.
        begin = self._converged(self._pass_start, threshold)
        end = max(begin, self._converged(self._pass_start * ratio, threshold))
        done = 1 - remaining / self._pass_start if self._pass_start else 1.0
        return _FIRST_PASS + (_PASSES_END - _FIRST_PASS) * (begin + (end - begin) * done)

    def _converged(self, remaining: float, threshold: float) -> float:
        """0 at the start of pass 2, 1 where the rest fits the downtime."""
        if remaining <= threshold or self._second_pass_start <= threshold:
            return 1.0
        return max(0.0, 1 - math.log(remaining / threshold) / math.log(self._second_pass_start / threshold))


def _page_bytes(info: Mapping[str, Any]) -> int:
    return int(info.get("ram", {}).get("page-size", 4096))


def _pages_done(info: Mapping[str, Any]) -> int:
    """Pages that were sent, as a whole, as a mark, or as what changed in them."""
    ram = info.get("ram", {})
    done = int(ram.get("normal", 0)) + int(ram.get("duplicate", 0))
    own = info.get("x-sterna")
    if own is not None:
        return done + int(own.get("saved-pages", 0))
    changed = info.get("xbzrle-cache", {})
    # Those whose code overflowed went whole, and were counted as such.
    return done + int(changed.get("pages", 0)) - int(changed.get("overflow", 0))
