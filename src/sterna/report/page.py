"""The page: what was run, a table of every claim with its figure, and each scenario's plots. The template beside has its form."""

import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sterna.report import plots
from sterna.report.figures import DOWNTIME_PARTS, downtime_parts, passes, remaining
from sterna.report.svg import number
from sterna.testbed.evidence import Evidence, MigrationRecord
from sterna.testbed.runner import Result

_DOWNTIME_ROWS = 24
_OPEN_MIGRATIONS = 2
_POINTS_SHOWN = 40
_DASH = "—"


@dataclass(frozen=True)
class Run:
    """What is said of a whole run.

    :ivar began: seconds since the epoch
    """

    began: float
    seconds: float
    reduced: bool = False


@dataclass(frozen=True)
class _Figure:
    """A plot and what is said of it.

    :ivar svg: our own markup, in which all that others said is escaped; empty when there is nothing to show
    :ivar legend: series by what they show
    """

    svg: Markup
    title: str
    note: str = ""
    legend: Mapping[str, int] = field(default_factory=dict)


def render(results: Sequence[Result], run: Run) -> str:
    """One HTML document that needs nothing else: no file, no network, no script."""
    loader = PackageLoader("sterna.report", "")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    kind = results[0].vm if results else "nothing"
    return environment.get_template("page.html").render(
        kind=kind,
        tally=_counts(results),
        facts={
            "VM": kind + (", reduced scenarios" if run.reduced else ""),
            "Begun": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(run.began)),
            "Took": f"{run.seconds:.0f} s",
            "Host": f"{platform.system()} {platform.release()}, {platform.machine()}",
            "sterna": metadata.version("sterna"),
        },
        notes=dict.fromkeys(result.note for result in results if result.note),
        results=results,
        open_migrations=_OPEN_MIGRATIONS,
        downtimes=_downtimes,
        over_time=_over_time,
        tables=_tables,
        migration_figures=_migration_figures,
    )


def _counts(results: Sequence[Result]) -> str:
    counts = Counter(result.outcome.value for result in results)
    claims = sum(len(result.findings) for result in results)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{len(results)} scenarios with {claims} claims: {told}"


# -- one scenario -----------------------------------------------------------------------------------------------


def _shown(figures: Sequence[_Figure]) -> list[_Figure]:
    return [figure for figure in figures if figure.svg]


def _downtimes(passages: Sequence[MigrationRecord]) -> list[_Figure]:
    rows = [
        (f"{record.guest}, {index}" if len(passages) > 1 else record.guest, downtime_parts(record))
        for index, record in enumerate(passages, 1)
        if record.completed
    ]
    rows.sort(key=lambda row: -sum(row[1].values()))
    note = f"the longest {_DOWNTIME_ROWS} of {len(rows)}" if len(rows) > _DOWNTIME_ROWS else ""
    legend = {name: series for series, name in enumerate(DOWNTIME_PARTS.values(), 1)}
    svg = plots.downtime_plot(rows[:_DOWNTIME_ROWS])
    return _shown([_Figure(svg, "Downtime by part", note, legend)])


def _over_time(evidence: Evidence) -> list[_Figure]:
    cancels = [cancelled.at for cancelled in evidence.cancelled]
    svg = plots.huge_pages_plot(evidence.huge_pages, evidence.blocks_before, cancels)
    note = "strokes at the bottom: migrate_cancel" if cancels else ""
    figures = [_Figure(svg, "Huge pages over time", note)]
    for reached in evidence.reachability:
        pings = [
            (ping.sent, None if ping.answered is None else ping.answered - ping.sent)
            for ping in reached.pings
        ]
        svg = plots.ping_plot(pings, [(record.began, record.ended) for record in reached.passages])
        note = "shaded: migrations; strokes at the bottom: lost"
        figures.append(_Figure(svg, f"Pings to {reached.guest}", note))
    return _shown(figures)


def _migration_figures(record: MigrationRecord) -> list[_Figure]:
    rates = plots.rates_plot(passes(record))
    legend = {"dirtied": 2, "sent": 1, "on the wire": 3}
    figures = [
        _Figure(plots.remaining_plot(remaining(record)), "Remaining RAM", _speed(record)),
        _Figure(rates, "RAM dirtied and sent per pass", legend=legend),
    ]
    for heat in record.heat:
        most = max(heat.most, default=0)
        note = f"{heat.block} from its start; faint: once, strong: most often (a page at most {most} times)"
        figures.append(_Figure(plots.heat_plot(heat), "How often pages were sent", note))
    return _shown(figures)


def _speed(record: MigrationRecord) -> str:
    if not record.transferred:
        return ""
    text = f"{number(record.transferred / 1e6)} MB on the wire in {number(record.total_ms / 1000)} s"
    return text + (f", {record.pass_count} passes" if record.pass_count else "")


def _tables(evidence: Evidence) -> dict[Sequence[str], list[list[object]]]:
    """Rows by the heads of their columns; no table without rows."""
    clocks = [(record.guest, record.blackout) for record in evidence.passages if record.blackout]
    observed = any(blackout.observer is not None for _, blackout in clocks)
    tables: dict[Sequence[str], list[list[object]]] = {
        ("Cancelled at", "MB sent", "Status", "ms to cancel", "Fewest huge pages", "Huge pages after"): [
            [
                f"{cancelled.point:g} of RAM in use",
                number(cancelled.transferred / 1e6),
                cancelled.status,
                number(cancelled.ms),
                _DASH if cancelled.least_blocks is None else cancelled.least_blocks,
                _DASH if cancelled.blocks_after is None else cancelled.blocks_after,
            ]
            for cancelled in evidence.cancelled
        ],
        ("Fault", "During", "Migration", "Guest runs on", "Pages compared"): [
            [case.fault, case.phase, case.status, " and ".join(case.runs_at) or "nowhere", case.pages_checked]
            for case in evidence.injured
        ],
        ("Taken by the host", ""): [[name, number(value)] for name, value in evidence.reclaimed.items()],
        ("Stood still", "ms by the guest's counter", "by the VMM", "by the observer"): [
            [guest, *(_DASH if ms is None else number(ms) for ms in (one.guest, one.vmm, one.observer))]
            for guest, one in (clocks[:_POINTS_SHOWN] if observed else [])
        ],
    }
    return {heads: rows for heads, rows in tables.items() if rows}
