"""The page: what was run, a table of every claim with its figure, and each scenario's plots."""

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import metadata, resources
from typing import Any

from sterna.report import plots
from sterna.report.figures import DOWNTIME_PARTS, downtime_parts, passes, remaining
from sterna.report.svg import number
from sterna.testbed.evidence import Evidence, Passage
from sterna.testbed.runner import Result

_DOWNTIME_ROWS = 24
_OPEN_PASSAGES = 2
_POINTS_SHOWN = 40


@dataclass(frozen=True)
class Run:
    """What is said of a whole run.

    :ivar began: seconds since the epoch
    """

    began: float
    seconds: float
    reduced: bool = False


def render(results: Sequence[Result], run: Run) -> str:
    """One HTML document that needs nothing else: no file, no network, no script."""
    kind = results[0].vm if results else "nothing"
    style = (resources.files("sterna.report") / "page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>sterna test bed: {escape(kind)}, {escape(_tally(results))}</title>",
            f"<style>{style}</style></head><body><main>",
            *_head(results, run, kind),
            *_claims(results),
            *(part for result in results for part in _scenario(result)),
            "</main></body></html>\n",
        ]
    )


def _head(results: Sequence[Result], run: Run, kind: str) -> Iterator[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(run.began))
    facts = {
        "VM": kind + (", reduced scenarios" if run.reduced else ""),
        "Begun": when,
        "Took": f"{run.seconds:.0f} s",
        "Host": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "sterna": metadata.version("sterna"),
    }
    yield f"<header><h1>sterna test bed</h1><p class=tally>{escape(_tally(results))}</p><dl>"
    yield from (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()
    )
    yield "</dl>"
    for note in dict.fromkeys(result.note for result in results if result.note):
        yield f"<p class=note>{escape(note)}</p>"
    yield "</header>"


def _tally(results: Sequence[Result]) -> str:
    outcomes = [result.outcome.value for result in results]
    counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    claims = sum(len(result.findings) for result in results)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{len(results)} scenarios with {claims} claims: {told}"


def _claims(results: Sequence[Result]) -> Iterator[str]:
    yield '<section><h2>Claims</h2><div class="scroll"><table><thead><tr><th scope="col">Scenario</th>'
    yield '<th scope="col">Outcome</th><th scope="col">Claim</th><th scope="col">Measured</th></tr></thead>'
    for result in results:
        rows = [
            f"<td>{_badge(finding.verdict.value)}</td><td>{escape(finding.claim)}</td><td>{escape(finding.figure)}"
            + _problems(finding.problems)
            + "</td>"
            for finding in result.findings
        ]
        if result.reason:
            rows.append(
                f"<td>{_badge(result.outcome.value)}</td><td>the scenario runs to its end</td><td>{escape(result.reason)}</td>"
            )
        yield "<tbody>"
        anchor = escape(result.scenario)
        head = f'<th scope="rowgroup" rowspan="{len(rows)}"><a href="#{anchor}">{anchor}</a></th>'
        for index, row in enumerate(rows):
            yield f"<tr>{'' if index else head}{row}</tr>"
        yield "</tbody>"
    yield "</table></div></section>"


def _problems(problems: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f"<ul>{items}</ul>" if items else ""


def _badge(outcome: str) -> str:
    return f'<span class="badge {escape(outcome)}">{escape(outcome)}</span>'


# -- one scenario -----------------------------------------------------------------------------------------------


def _scenario(result: Result) -> Iterator[str]:
    evidence = result.evidence
    yield f'<section id="{escape(result.scenario)}"><h2>{escape(result.scenario)} {_badge(result.outcome.value)}</h2>'
    yield f"<p>{escape(result.title)} <span class=muted>({result.seconds:.1f} s)</span></p>"
    yield from _downtimes(evidence.passages)
    yield from _grid(_over_time(evidence))
    yield from _tables(evidence)
    shown = evidence.passages
    for index, passage in enumerate(shown):
        figures = list(_passage(passage))
        if not figures:
            continue
        title = escape(f"{passage.guest}: {passage.source} to {passage.destination}, {passage.load}")
        if len(shown) > _OPEN_PASSAGES:
            yield f"<details><summary>Migration {index + 1}. {title}</summary>"
            yield from _grid(figures)
            yield "</details>"
        else:
            yield f"<h3>{title}</h3>"
            yield from _grid(figures)
    yield "</section>"


def _figure(svg: str, title: str, note: str = "", legend: Mapping[str, int] | None = None) -> Iterator[str]:
    if not svg:
        return
    keys = "".join(
        f'<span class="key"><i class="s{series}"></i>{escape(name)}</span>'
        for name, series in (legend or {}).items()
    )
    text = f"<b>{escape(title)}</b>" + (f" <span class=muted>{escape(note)}</span>" if note else "")
    yield f"<figure><figcaption>{text}{f'<div class=keys>{keys}</div>' if keys else ''}</figcaption>{svg}</figure>"


def _grid(figures: "Sequence[str] | Iterator[str]") -> Iterator[str]:
    parts = list(figures)
    if parts:
        yield '<div class="grid-of-figures">'
        yield from parts
        yield "</div>"


def _downtimes(passages: Sequence[Passage]) -> Iterator[str]:
    rows = [
        (f"{passage.guest}, {index}" if len(passages) > 1 else passage.guest, downtime_parts(passage))
        for index, passage in enumerate(passages, 1)
        if passage.completed
    ]
    rows.sort(key=lambda row: -sum(row[1].values()))
    note = f"the longest {_DOWNTIME_ROWS} of {len(rows)}" if len(rows) > _DOWNTIME_ROWS else ""
    legend = {name: series for series, name in enumerate(DOWNTIME_PARTS.values(), 1)}
    svg = plots.downtime_plot(rows[:_DOWNTIME_ROWS])
    yield from _grid(_figure(svg, "Downtime by part", note, legend))


def _over_time(evidence: Evidence) -> Iterator[str]:
    cancels = [cancelled.at for cancelled in evidence.cancelled]
    svg = plots.huge_pages_plot(evidence.huge_pages, evidence.blocks_before, cancels)
    yield from _figure(
        svg, "Huge pages over time", "strokes at the bottom: migrate_cancel" if cancels else ""
    )
    for reached in evidence.reachability:
        pings = [
            (ping.sent, None if ping.answered is None else ping.answered - ping.sent)
            for ping in reached.pings
        ]
        svg = plots.ping_plot(pings, [(passage.began, passage.ended) for passage in reached.passages])
        yield from _figure(
            svg, f"Pings to {reached.guest}", "shaded: migrations; strokes at the bottom: lost"
        )


def _passage(passage: Passage) -> Iterator[str]:
    yield from _figure(plots.remaining_plot(remaining(passage)), "Remaining RAM", _speed(passage))
    yield from _figure(
        plots.rates_plot(passes(passage)),
        "RAM dirtied and sent per pass",
        legend={"dirtied": 2, "sent": 1, "on the wire": 3},
    )
    for heat in passage.heat:
        most = max(heat.most, default=0)
        note = f"{heat.block} from its start; faint: once, strong: most often (a page at most {most} times)"
        yield from _figure(plots.heat_plot(heat), "How often pages were sent", note)


def _speed(passage: Passage) -> str:
    if not passage.transferred:
        return ""
    text = f"{number(passage.transferred / 1e6)} MB on the wire in {number(passage.total_ms / 1000)} s"
    return text + (f", {passage.pass_count} passes" if passage.pass_count else "")


def _tables(evidence: Evidence) -> Iterator[str]:
    if evidence.cancelled:
        rows = [
            [
                f"{cancelled.point:g} of RAM in use",
                number(cancelled.transferred / 1e6),
                cancelled.status,
                number(cancelled.ms),
                _or_dash(cancelled.least_blocks),
                _or_dash(cancelled.blocks_after),
            ]
            for cancelled in evidence.cancelled
        ]
        heads = ["Cancelled at", "MB sent", "Status", "ms to cancel", "Fewest huge pages", "Huge pages after"]
        yield from _table(heads, rows)
    if evidence.injured:
        rows = [
            [
                case.fault,
                case.phase,
                case.status,
                " and ".join(case.runs_at) or "nowhere",
                str(case.pages_checked),
            ]
            for case in evidence.injured
        ]
        yield from _table(["Fault", "During", "Migration", "Guest runs on", "Pages compared"], rows)
    if evidence.reclaimed:
        rows = [[name, number(value)] for name, value in evidence.reclaimed.items()]
        yield from _table(["Taken by the host", ""], rows)
    clocks = [(passage, passage.blackout) for passage in evidence.passages if passage.blackout]
    if clocks and any(blackout.observer is not None for _, blackout in clocks):
        rows = [
            [passage.guest, *(number(ms) if ms is not None else "—" for ms in (b.guest, b.vmm, b.observer))]
            for passage, b in clocks[:_POINTS_SHOWN]
        ]
        yield from _table(["Stood still", "ms by the guest's counter", "by the VMM", "by the observer"], rows)


def _or_dash(value: int | None) -> str:
    return "—" if value is None else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    yield f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
