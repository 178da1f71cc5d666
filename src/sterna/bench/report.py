"""The measurements for people, and for machines."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from sterna.bench.campaign import CampaignSettings, Comparison, Series
from sterna.bench.summary import GoalResult, Summary, judge, summarise_all
from sterna.bench.table import print_table
from sterna.host.limits import usable_cpus
from sterna.host.units import format_rate, format_size

_DASH = "—"


def to_json(comparisons: Sequence[Comparison], settings: CampaignSettings) -> dict[str, Any]:
    """Everything: settings, each run, medians, goals."""
    summaries = {one.workload.name: summarise_all(one) for one in comparisons}
    return {
        "host": {"cpus": usable_cpus(), "kernel": platform.release(), "machine": platform.machine()},
        "accel": settings.accel,
        "qemu": settings.qemu and vars(settings.qemu),
        "runs": settings.runs,
        "timeout_s": settings.timeout,
        "workloads": [
            {
                "name": one.workload.name,
                "title": one.workload.title,
                "memory_bytes": one.config.memory_bytes,
                "guest": f"{one.config.kernel} {one.config.append}".strip(),
                "content": one.workload.content.value,
                "bandwidth": one.workload.bandwidth,
                "downtime_limit_ms": one.workload.downtime_limit_ms,
                "results": [
                    summary.to_dict() | {"each": [run.to_dict() for run in series.measurements]}
                    for summary, series in zip(summaries[one.workload.name], one.series, strict=True)
                ],
            }
            for one in comparisons
        ],
        "goals": [vars(judgement) for judgement in _judged(summaries, settings)],
    }


def print_report(console: Console, comparisons: Sequence[Comparison], settings: CampaignSettings) -> None:
    """Tables for each workload, and one of the goals."""

    def line(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    summaries = {one.workload.name: summarise_all(one) for one in comparisons}
    if settings.qemu is not None:
        line(f"QEMU {settings.qemu.version}: {settings.qemu.path}")
    for comparison in comparisons:
        line(_title(comparison, settings))
        rows = summaries[comparison.workload.name]
        _print_figures(console, rows)
        for row, series in zip(rows, comparison.series, strict=True):
            if row.medians["seconds"] is None:
                line(f"{row.variant}: {row.outcome}{_besides(series)}")
    judged = _judged(summaries, settings)
    print_goals(console, judged)
    missed = {one.workload for one in judged if one.met is False}
    for comparison in comparisons:
        loads = [run.host for one in comparison.series for run in one.measurements if run.host]
        if comparison.workload.name in missed and loads:
            line(f"{comparison.workload.name}, at the busiest: {max(loads, key=lambda load: load.taken)}")


def _title(comparison: Comparison, settings: CampaignSettings) -> str:
    workload, config = comparison.workload, comparison.config
    limit = f"{format_rate(workload.bandwidth)}" if workload.bandwidth else "no bandwidth limit"
    runs = "1 run" if settings.runs == 1 else f"medians of {settings.runs}"
    guest = "idle" if workload.idle else f"{config.kernel} {config.append}"
    guest += " on KVM" if config.accel == "kvm" else ""
    content = f", {workload.content.value} RAM" if workload.idle else ""
    return f"{workload.name}: {guest}{content}, {format_size(config.memory_bytes)}, {limit}; {runs}"


def _judged(summaries: Mapping[str, Sequence[Summary]], settings: CampaignSettings) -> list[GoalResult]:
    return judge(summaries) if settings.memory_bytes is None and settings.accel == "emulated" else []


def _print_figures(console: Console, summaries: Sequence[Summary]) -> None:
    rows = [
        [column.cell({**one.medians, "rate": one.throughput}[column.name]) for column in _COLUMNS]
        for one in summaries
    ]
    # Idle guests have no speed, and nothing predicts the raw ceiling's downtime.
    shown = [i for i in range(len(_COLUMNS)) if any(row[i] != _DASH for row in rows)]
    cells = [[one.variant, *(row[i] for i in shown)] for one, row in zip(summaries, rows, strict=True)]
    print_table(console, ["", *(_COLUMNS[i].title for i in shown)], [cells])


def _besides(series: Series) -> str:
    """What else is known of the last run, which did not complete."""
    if not series.measurements:
        return ""
    last, told = series.measurements[-1], ""
    if last.guest_speed is not None:
        told += f"; its guest ran at {100 * last.guest_speed:.0f} % of its speed"
        told += f", throttled by {last.throttle_percent} %" if last.throttle_percent else ""
    return f"{told}; {last.host}" if last.host else told


@dataclass(frozen=True)
class _Column:
    """:ivar scale: of a figure, to the title's unit"""

    title: str
    name: str
    digits: int
    scale: float = 1.0

    def cell(self, value: float | None) -> str:
        return _DASH if value is None else f"{value * self.scale:.{self.digits}f}"


_COLUMNS = (
    _Column("time\ns", "seconds", 2),
    _Column("sent\nGB", "bytes", 3, 1e-9),
    _Column("rate\nGB/s", "rate", 2, 1e-9),
    _Column("downtime\nms", "downtime_ms", 0),
    _Column("predicted\nms", "predicted_ms", 0),
    _Column("guest's\nspeed %", "guest_speed", 0, 100),
    _Column("throttle\n%", "throttle_percent", 0),
    _Column("passes\n", "passes", 0),
    _Column("CPU s\nsource", "source_cpu_s", 2),
    _Column("CPU s\ndest.", "destination_cpu_s", 2),
    _Column("writes/s\nbefore", "writes_before", 0),
    _Column("writes/s\nmeanwhile", "writes_during", 0),
)


def print_goals(console: Console, judgements: Sequence[GoalResult]) -> None:
    """A table of goals, and of what was measured; nothing when there are none."""
    met = {True: "met", False: "missed", None: _DASH}
    rows = [[one.workload, one.goal, one.measured, met[one.met]] for one in judgements]
    if rows:
        print_table(console, ("goal", "", "measured", ""), [rows], labels=4)
