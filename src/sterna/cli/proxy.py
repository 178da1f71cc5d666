"""`sterna stream proxy`: sit between the two ends of a live migration, and say what goes through."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sterna.cli.errors import CliError, ExitCode, UsageError
from sterna.cli.paths import NamedPath
from sterna.cli.streamreport import print_table, show_survey, survey_report, to_json
from sterna.host.closing import Closing
from sterna.host.printable import printable

if TYPE_CHECKING:
    from rich.live import Live

    from sterna.analysis.proxy.proxy import Proxy
    from sterna.analysis.proxy.view import ProxyView
    from sterna.launch.signals import Interrupts
    from sterna.migration.channels.uri import ListeningUri, Uri

log = logging.getLogger(__name__)

_LINE_SECONDS = 1.0
_LIVE_PASSES = 12


@click.command("proxy")
@click.argument("listen")
@click.argument("destination")
@click.option(
    "--record",
    metavar="DIR",
    type=NamedPath(path_type=Path),
    help="Keep all that goes through in DIR, an empty or a new directory, for `info`, `verify` and `diff`.",
)
@click.option(
    "--digests/--no-digests",
    default=True,
    help="Hold guest RAM as the destination has it, to digest it at the end. On by default.",
)
@click.option("--json", is_flag=True, help="Print one JSON object at the end.")
def command(listen: str, destination: str, record: Path | None, digests: bool, json: bool) -> int:
    """Forward one live migration from LISTEN to DESTINATION, and show what is in it.

    Both are migration URIs (tcp:HOST:PORT, unix:PATH): the source migrates to LISTEN, the destination waits at
    DESTINATION. Not a byte is changed. Shown are passes while they run, and at the end sections, bytes by
    kind, digests of the RAM that the destination ends up with, and how the migration ended.

    Ctrl-C cuts the migration: the guest goes on at the source. Once the destination has everything it waits
    for its answer; again Ctrl-C does not, and then the outcome may be unknown.

    \b
    Exit codes: 0 completed, 1 could not start or reach the destination, 2 wrong call, 3 failed, 4 cancelled here,
    5 completed, but what went through could not be understood, 6 outcome unknown, 130 nothing came.
    """
    from sterna.analysis.proxy.proxy import Proxy
    from sterna.cli.heap import share_heap
    from sterna.cli.kernels import prepare_survey_kernels
    from sterna.launch.signals import Interrupts
    from sterna.migration.channels import uri
    from sterna.migration.errors import UriError

    try:
        near = _listening_uri(listen, uri.parse)
        far = _listening_uri(destination, uri.parse_destination)
        proxy = Proxy(near, far, digests=digests, record=record)
    except UriError as error:
        raise UsageError(str(error)) from error
    with proxy, Interrupts().caught() as interrupts:
        prepare_survey_kernels(interrupts.check)
        share_heap()
        print(f"sterna: listening on {proxy.uri}, forwarding to {destination}", file=sys.stderr, flush=True)
        with _Display(interrupts, live=not json and sys.stderr.isatty(), lines=not json) as display:
            view = proxy.run(display.show)
    if json:
        click.echo(to_json(_report(view)))
    else:
        _show(view)
    return _exit(view)


def _listening_uri(text: str, parse: "Callable[[str], Uri]") -> "ListeningUri":
    from sterna.migration.channels.tcp import TcpUri
    from sterna.migration.channels.unix import UnixUri

    uri = parse(text)
    if not isinstance(uri, TcpUri | UnixUri):
        raise UsageError(f"{text[:80]!r}: a proxy forwards between tcp:HOST:PORT and unix:PATH")
    return uri


class _Display(Closing):
    """Shows a migration as it goes through: live on a terminal, as lines elsewhere."""

    def __init__(self, interrupts: "Interrupts", *, live: bool, lines: bool) -> None:
        self._interrupts = interrupts
        self._seen_interrupts = 0
        self._lines = lines
        self._live = _live_view() if live else None
        self._shown = time.monotonic()
        self._bytes = self._passes = 0

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._live:
                self._live.stop()

    def show(self, proxy: "Proxy") -> None:
        """Called again and again while the proxy runs."""
        while self._seen_interrupts < self._interrupts.count:
            self._seen_interrupts += 1
            proxy.interrupt()
        try:
            self._draw(proxy)
        except Exception as error:
            # Whatever it is (a terminal that is gone), the migration goes on, and its report comes at the end.
            self._live, self._lines = None, False
            log.debug("no more is shown: %s", error)

    def _draw(self, proxy: "Proxy") -> None:
        now = time.monotonic()
        if not (self._live or self._lines) or now - self._shown < (0.25 if self._live else _LINE_SECONDS):
            return
        view = proxy.view()
        line = self._line(view, now)
        self._shown, self._bytes = now, view.forwarded
        if not view.forwarded:
            return
        if self._live:
            from rich.console import Group
            from rich.text import Text

            rows = [Text(text) for text in _pass_lines(view)[-_LIVE_PASSES:]]
            self._live.update(Group(*rows, Text(line)), refresh=True)
            return
        lines = _pass_lines(view)[self._passes : -1]
        self._passes += len(lines)
        for text in [*lines, line]:
            print(text, file=sys.stderr, flush=True)

    def _line(self, view: "ProxyView", now: float) -> str:
        from sterna.host.units import format_rate, format_size

        rate = (view.forwarded - self._bytes) / (now - self._shown)
        parts = [f"{format_size(view.forwarded)} in {view.seconds:.1f} s", format_rate(rate)]
        if view.survey and view.survey.passes:
            parts.insert(0, f"pass {len(view.survey.passes)}")
            parts.append(f"{sum(block.repeated for block in view.survey.blocks)} pages sent again")
        if (channels := sum(one.count for one in view.connections) - 1) > 0:
            parts.append(f"{channels} more connections")
        if view.waiting:
            parts.append(f"waiting for {view.waiting}")
        return ", ".join(parts)


def _live_view() -> "Live":
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)
    live.start()
    return live


def _pass_lines(view: "ProxyView") -> list[str]:
    from sterna.host.units import format_size

    if not view.survey:
        return []
    return [
        f"pass {one.number} from {start:.2f} s: {one.normal} full, {one.zero} zero"
        + (f", {one.changed} changed" if one.changed else "")
        + f" pages, {format_size(one.bytes)}"
        for one, start in zip(view.survey.passes, view.pass_starts, strict=True)
    ]


def _speed(view: "ProxyView") -> float:
    return view.forwarded / view.seconds if view.seconds else 0.0


def _pass_seconds(view: "ProxyView") -> list[float]:
    """How long each pass took; the last lasts until the end."""
    return [end - start for start, end in pairwise([*view.pass_starts, view.seconds])]


def _report(view: "ProxyView") -> dict[str, Any]:
    answers, survey = view.answers, view.survey
    stream = survey_report(survey) if survey else None
    if stream:
        seconds = _pass_seconds(view)
        for one, start, length in zip(stream["passes"], view.pass_starts, seconds, strict=False):
            one |= {"start_seconds": round(start, 6), "seconds": round(length, 6)}
    flaw = survey.flaw() if survey else None
    return {
        "outcome": view.verdict.outcome.value,
        "reason": view.verdict.reason,
        "forwarded_bytes": view.forwarded,
        "seconds": round(view.seconds, 6),
        "bytes_per_second": round(_speed(view)),
        "stalled_seconds": round(view.stalled_seconds, 6),
        "confirmed_seconds": view.confirmed_seconds,
        "connections": [
            {
                "kind": one.kind.value,
                "count": one.count,
                "forwarded_bytes": one.forwarded,
                "returned_bytes": one.returned,
            }
            for one in view.connections
        ],
        "turned_away": view.turned_away,
        "return_path": dict(answers.counts),
        "stream": stream,
        "flaw": asdict(flaw) if flaw else None,
        "analysis_fault": view.analysis_fault or None,
        "recording_fault": view.recording_fault or None,
    }


def _show(view: "ProxyView") -> None:
    from sterna.host.units import format_rate, format_size

    if view.survey and view.survey.configuration:
        show_survey("stream", view.survey)
        rows = [
            (
                one.number,
                f"{start:.3f}",
                f"{length:.3f}",
                format_rate(one.bytes / length if length > 0 else 0),
            )
            for one, start, length in zip(
                view.survey.passes, view.pass_starts, _pass_seconds(view), strict=True
            )
        ]
        print_table("Passes in time", ("pass", "from (s)", "seconds", "speed"), rows, texts=0)
    connections = [
        (one.kind.value + (f", {one.count} of them" if one.count > 1 else ""), one.forwarded, one.returned)
        for one in view.connections
    ]
    print_table("Connections", ("carries", "bytes forward", "bytes back"), connections)
    print_table("Return path", ("message", "count"), sorted(view.answers.counts.items()))
    if view.forwarded:
        click.echo(
            f"\n{format_size(view.forwarded)} in {view.seconds:.2f} s, {format_rate(_speed(view))}; "
            f"forwarding waited {view.stalled_seconds:.2f} s for analysis and recording"
        )
    if view.turned_away:
        click.echo(f"{view.turned_away} connections were too many, and turned away")
    reason = f": {view.verdict.reason}" if view.verdict.reason else ""
    click.echo(printable(f"{view.verdict.outcome.value}{reason}"))


def _exit(view: "ProxyView") -> int:
    """:raise CliError: With the exit code, when not all is well."""
    from sterna.analysis.proxy.outcome import ProxyOutcome

    codes = {
        ProxyOutcome.COMPLETED: ExitCode.OK,
        ProxyOutcome.UNCONFIRMED: ExitCode.OK,
        ProxyOutcome.FAILED: ExitCode.MIGRATION_FAILED,
        ProxyOutcome.CANCELLED: ExitCode.CANCELLED,
        ProxyOutcome.UNREACHABLE: ExitCode.FAILURE,
        ProxyOutcome.IN_DOUBT: ExitCode.LOST,
        ProxyOutcome.UNKNOWN: ExitCode.LOST,
        ProxyOutcome.NOTHING: ExitCode.INTERRUPTED,
    }
    code = codes[view.verdict.outcome]
    flaw = view.survey.flaw() if view.survey else None
    if code is not ExitCode.OK:
        raise CliError(f"{view.verdict.outcome.value}: {printable(view.verdict.reason)}", code)
    if view.analysis_fault or flaw:
        text = view.analysis_fault or (flaw.text if flaw else "")
        raise CliError(
            f"completed, but the stream cannot be understood: {printable(text)}", ExitCode.NOT_VERIFIED
        )
    if view.recording_fault:
        raise CliError(f"completed, but the recording is not whole: {printable(view.recording_fault)}")
    return ExitCode.OK
