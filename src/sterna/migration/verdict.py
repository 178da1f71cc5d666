"""Why a migration does not converge, and what would make it, in words."""

import math

from sterna.memory.address import PAGE_SIZE
from sterna.migration.policy import ConvergenceState

LOSING = 0.9
"""A pass that is followed by one this long compared with it gains little: two in a row do not converge."""
_LOST = 0.98
"""One is enough."""
_FULL_THROTTLE = 99


def is_losing(state: ConvergenceState) -> bool:
    """Whether passes do not get shorter. Pass 1 sends all of RAM: what follows it says little."""
    if state.last.number == 1 or state.fits:
        return False
    before, last = state.passes[-2:]
    twice = state.ratio >= LOSING and last.seconds >= LOSING * before.seconds
    return twice or state.ratio >= _LOST


def verdict(state: ConvergenceState) -> str:
    """One line; empty when the migration converges."""
    return explain(state) if is_losing(state) else ""


def explain(state: ConvergenceState) -> str:
    """What the guest does, what the link carries, and which downtime limit, bandwidth or throttle would do."""
    s = state
    dirty = s.dirty_pages / s.last.seconds if s.last.seconds else 0.0
    text = f"the guest dirties {dirty * PAGE_SIZE / 1e6:.1f} MB/s ({dirty:.0f} pages/s"
    if s.page_bytes < 0.9 * PAGE_SIZE:
        text += f", {s.dirty_bytes_per_second / 1e6:.1f} MB/s as encoded"
    text += f"), and {s.bytes_per_second / 1e6:.1f} MB/s go through"
    remedies = [f"a downtime limit of {_rounded_up(s.predicted.total)} ms"]
    if s.ratio >= LOSING:
        needed = s.bytes_per_second * s.ratio / LOSING
        remedies.append(f"a bandwidth above {needed / 1e6:.1f} MB/s")
        running = (100 - s.last.throttle_percent) * LOSING / s.ratio
        throttle = math.floor(100 - running) + 1
        if throttle <= _FULL_THROTTLE:
            remedies.append(f"a throttle of {throttle} %")
    return f"{text}; what would do: {_alternatives(remedies)}"


def _rounded_up(ms: float) -> int:
    """A limit to set: two digits are as exact as a prediction."""
    unit = int(10 ** max(0, math.floor(math.log10(max(ms, 1.0))) - 1))
    return math.ceil(ms / unit) * unit


def _alternatives(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
