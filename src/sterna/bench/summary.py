"""Medians of the runs, and what of the goals they reach."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sterna.bench.campaign import Comparison, Series
from sterna.bench.migration import RunOutcome
from sterna.bench.workloads import Who

_MEDIANS = (
    "seconds",
    "bytes",
    "total_ms",
    "downtime_ms",
    "predicted_ms",
    "passes",
    "source_cpu_s",
    "destination_cpu_s",
    "writes_before",
    "writes_during",
    "guest_speed",
    "throttle_percent",
)


@dataclass(frozen=True)
class Summary:
    """One variant with one workload.

    :ivar completed: how many of the runs did
    :ivar medians: by field of `Measurement`, over the runs that completed; None where those have no figure
    :ivar verified: every run that completed was verified
    """

    variant: str
    who: Who
    runs: int
    completed: int
    medians: Mapping[str, float | None]
    verified: bool
    outcome: str

    @property
    def throughput(self) -> float | None:
        """Bytes of the stream per second of the whole migration."""
        seconds, size = self.medians["seconds"], self.medians["bytes"]
        return size / seconds if seconds and size is not None else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "outcome": self.outcome,
            "runs": self.runs,
            "completed": self.completed,
            "verified": self.verified,
            "bytes_per_second": self.throughput,
            "median": dict(self.medians),
        }


def summarise(series: Series) -> Summary:
    """Medians over the runs that completed, if most did; otherwise how the others ended."""
    done = [one for one in series.measurements if one.outcome is RunOutcome.COMPLETED]
    outcome = "completed"
    if series.unavailable:
        outcome = f"not available: {series.unavailable}"
    elif 2 * len(done) <= len(series.measurements):
        others = [one for one in series.measurements if one.outcome is not RunOutcome.COMPLETED]
        last = others[-1] if others else None
        outcome = (
            "not run" if last is None else last.outcome.value + (f": {last.error}" if last.error else "")
        )
    medians: dict[str, float | None] = {}
    for name in _MEDIANS:
        values = [value for one in done if (value := getattr(one, name)) is not None]
        medians[name] = statistics.median(values) if values and outcome == "completed" else None
    return Summary(
        series.variant.name,
        series.variant.who,
        len(series.measurements),
        len(done),
        medians,
        bool(done) and all(one.verified for one in done),
        outcome,
    )


def summarise_all(comparison: Comparison) -> list[Summary]:
    return [summarise(series) for series in comparison.series]


@dataclass(frozen=True)
class GoalResult:
    """:ivar measured: the figures that decide, with the variants they are of
    :ivar met: None when what it takes was not measured
    """

    workload: str
    goal: str
    measured: str
    met: bool | None


def judge(summaries: Mapping[str, Sequence[Summary]]) -> list[GoalResult]:
    """All goals of the workloads that were measured. They hold for guests of the workloads' own size.

    :param summaries: by workload
    """
    return [
        GoalResult(goal.workload, goal.text, *goal.judge(summaries[goal.workload]))
        for goal in GOALS
        if goal.workload in summaries
    ]


Measured = tuple[str, bool | None]


@dataclass(frozen=True)
class Goal:
    workload: str
    text: str
    judge: Callable[[Sequence[Summary]], Measured]


def _best(summaries: Sequence[Summary], who: Who) -> Summary | None:
    """The quickest of those that completed."""
    done = [one for one in summaries if one.who is who and one.medians["seconds"] is not None]
    return min(done, key=lambda one: one.medians["seconds"] or 0.0, default=None)


def _times_qemu(least: float) -> Callable[[Sequence[Summary]], Measured]:
    def judge(summaries: Sequence[Summary]) -> Measured:
        ours, theirs = _best(summaries, Who.STERNA), _best(summaries, Who.QEMU)
        if ours is None or theirs is None:
            return "not measured on both sides", None
        mine, other = ours.medians["seconds"], theirs.medians["seconds"]
        assert mine is not None
        assert other is not None
        text = f"{other / mine:.2f} x: {ours.variant} {mine:.2f} s, {theirs.variant} {other:.2f} s"
        return text, other / mine >= least

    return judge


def _of_ceiling(least: float) -> Callable[[Sequence[Summary]], Measured]:
    def judge(summaries: Sequence[Summary]) -> Measured:
        ours, raw = _best(summaries, Who.STERNA), _best(summaries, Who.RAW)
        if ours is None or raw is None:
            return "not measured on both sides", None
        mine, ceiling = ours.throughput or 0.0, raw.throughput or 0.0
        share = mine / ceiling
        figures = f"{ours.variant} {mine / 1e9:.2f} GB/s, {raw.variant} {ceiling / 1e9:.2f} GB/s"
        return f"{share:.0%}: {figures}", share >= least

    return judge


def _within(verified: bool = False, **most: float) -> Callable[[Sequence[Summary]], Measured]:
    """Limits on medians of the quickest sterna, by their names."""

    def judge(summaries: Sequence[Summary]) -> Measured:
        tried = [one for one in summaries if one.who is Who.STERNA and one.runs]
        ours = _best([one for one in tried if one.verified or not verified], Who.STERNA)
        if not tried:
            return "not measured", None
        if ours is None:
            return "; ".join(f"{one.variant}: {one.outcome}" for one in tried), False
        values = {name: ours.medians[name] for name in most}
        shown = ", ".join(_SHOW[name](value) for name, value in values.items() if value is not None)
        met = all(value is not None and value <= most[name] for name, value in values.items())
        return f"{ours.variant}: {shown}", met

    return judge


def _predicted(within: float) -> Callable[[Sequence[Summary]], Measured]:
    def judge(summaries: Sequence[Summary]) -> Measured:
        ours = _best(summaries, Who.STERNA)
        if ours is None:
            return "not measured", None
        real, told = ours.medians["downtime_ms"], ours.medians["predicted_ms"]
        if not real or told is None:
            return f"{ours.variant}: nothing was predicted", None
        return f"{ours.variant}: {told:.0f} ms for {real:.0f} ms", abs(told / real - 1) <= within

    return judge


_SHOW: Mapping[str, Callable[[float], str]] = {
    "seconds": lambda value: f"{value:.1f} s",
    "bytes": lambda value: f"{value / 1e9:.2f} GB",
    "downtime_ms": lambda value: f"{value:.0f} ms",
}

GOALS: Sequence[Goal] = (
    Goal("idle-random", "1.5 x QEMU's best", _times_qemu(1.5)),
    Goal("idle-random", "85 % of the raw ceiling", _of_ceiling(0.85)),
    Goal("idle-zero", "3 x QEMU's best", _times_qemu(3)),
    Goal("dirty-1g", "6 s, 0.5 GB, 24 ms", _within(seconds=6, bytes=0.5e9, downtime_ms=24)),
    Goal("hard-1g", "verified in 20 s, 300 ms", _within(verified=True, seconds=20, downtime_ms=300)),
    Goal("hard", "100 ms", _within(downtime_ms=100)),
    *(
        Goal(name, "downtime predicted within 20 %", _predicted(0.2))
        for name in ("dirty-1g", "dirty", "hard-1g", "hard")
    ),
)
"""What sterna is to reach, on full-sized guests. They compare the quickest variants of each side."""
