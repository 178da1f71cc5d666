"""The measurements for people, and for machines."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sterna.cli.bench.campaign import Comparison, Settings
from sterna.cli.bench.summary import Judgement, Summary, judge, summarise_all
from sterna.monitor.units import format_rate, format_size

_DASH = "—"


def to_json(comparisons: Sequence[Comparison], settings: Settings) -> dict[str, Any]:
    """Everything: settings, each run, medians, goals."""
    summaries = {one.workload.name: summarise_all(one) for one in comparisons}
    return {
        "host": {"cpus": os.cpu_count(), "kernel": platform.release(), "machine": platform.machine()},
        "accel": settings.accel,
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


def print_report(console: Console, comparisons: Sequence[Comparison], settings: Settings) -> None:
    """A table for each workload, and one of the goals."""
    summaries = {one.workload.name: summarise_all(one) for one in comparisons}
    for comparison in comparisons:
        console.print(_title(comparison, settings), soft_wrap=True, highlight=False)
        rows = summaries[comparison.workload.name]
        console.print(_table(rows, comparison.workload.idle))
        for row in rows:
            if row.medians["seconds"] is None:
                console.print(f"{row.variant}: {row.outcome}", soft_wrap=True, highlight=False)
    print_goals(console, _judged(summaries, settings))


def _title(comparison: Comparison, settings: Settings) -> str:
    workload, config = comparison.workload, comparison.config
    limit = f"{format_rate(workload.bandwidth)}" if workload.bandwidth else "no bandwidth limit"
    runs = "1 run" if settings.runs == 1 else f"medians of {settings.runs}"
    guest = "idle" if workload.idle else f"{config.kernel} {config.append}"
    guest += " on KVM" if config.accel == "kvm" else ""
    content = f", {workload.content.value} RAM" if workload.idle else ""
    return f"{workload.name}: {guest}{content}, {format_size(config.memory_bytes)}, {limit}; {runs}"


def _judged(summaries: Mapping[str, Sequence[Summary]], settings: Settings) -> list[Judgement]:
    return judge(summaries) if settings.memory_bytes is None and settings.accel == "emulated" else []


def _table(summaries: Sequence[Summary], idle: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = [column for column in _COLUMNS if not (idle and column.loaded)]
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for summary in summaries:
        if summary.medians["seconds"] is None:
            table.add_row(summary.variant, *[_DASH] * len(columns))
        else:
            values = {**summary.medians, "rate": summary.throughput}
            table.add_row(summary.variant, *(column.cell(values[column.name]) for column in columns))
    return table


@dataclass(frozen=True)
class _Column:
    """:ivar scale: of a figure, to the title's unit
    :ivar loaded: only for guests that write
    """

    title: str
    name: str
    digits: int
    scale: float = 1.0
    loaded: bool = False

    def cell(self, value: float | None) -> str:
        return _DASH if value is None else f"{value * self.scale:.{self.digits}f}"


_COLUMNS = (
    _Column("time\ns", "seconds", 2),
    _Column("sent\nGB", "bytes", 3, 1e-9),
    _Column("rate\nGB/s", "rate", 2, 1e-9),
    _Column("downtime\nms", "downtime_ms", 0),
    _Column("predicted\nms", "predicted_ms", 0),
    _Column("passes\n", "passes", 0),
    _Column("CPU s\nsource", "source_cpu_s", 2),
    _Column("CPU s\ndest.", "destination_cpu_s", 2),
    _Column("writes/s\nbefore", "writes_before", 0, loaded=True),
    _Column("writes/s\nmeanwhile", "writes_during", 0, loaded=True),
)


def print_goals(console: Console, judgements: Sequence[Judgement]) -> None:
    """A table of goals, and of what was measured; nothing when there are none."""
    if not judgements:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("goal", "", "measured", ""):
        table.add_column(name, overflow="fold")
    for one in judgements:
        met = {True: "met", False: "missed", None: _DASH}[one.met]
        table.add_row(one.workload, one.goal, one.measured, met)
    console.print(table)
