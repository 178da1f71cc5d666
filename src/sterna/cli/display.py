"""What people see of a migration: a live display on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from sterna.cli.progressestimate import ProgressEstimate
from sterna.cli.result import farewell, outcome_line
from sterna.host.closing import Closing
from sterna.host.printable import printable
from sterna.host.units import format_rate, format_size

if TYPE_CHECKING:
    from rich.live import Live

_LINE_SECONDS = 1.0
_BAR_WIDTH, _RATE_WIDTH = 46, 24


def format_seconds(seconds: float) -> str:
    """``0.4 ms``, ``250 ms``, ``4.2 s``, ``3 min 5 s``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.{0 if seconds >= 0.01 or not seconds else 1}f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_measured(rate: float | None) -> str:
    """As `format_rate`; a dash for what has not been measured yet."""
    return "—" if rate is None else format_rate(rate)


def outlook(estimate: ProgressEstimate) -> str:
    """When it will end, or why not."""
    throttle = estimate.throttle_percent
    if estimate.status == "cancelling":
        return "cancelling"
    if estimate.status == "device":
        return "switchover: the guest is stopped"
    if estimate.converges is False:
        if throttle:
            return f"throttling the guest by {throttle} %"
        return f"will not converge: {estimate.verdict}" if estimate.verdict else "will not converge"
    if estimate.eta_seconds is None:
        return "measuring"
    if estimate.pass_number <= 1:
        return f"pass 1 done in {format_seconds(estimate.eta_seconds)}"
    text = f"switchover in {format_seconds(estimate.eta_seconds)}"
    if estimate.expected_downtime_ms is not None:
        text += f"; stopped now, a downtime of {format_seconds(estimate.expected_downtime_ms / 1000)}"
    return text + (f"; guest throttled by {throttle} %" if throttle else "")


class Display(Closing):
    """Shows nothing; the other displays are made from it."""

    def show(self, estimate: ProgressEstimate) -> None:
        """The migration as it is now."""

    def note(self, text: str) -> None:
        """Something happened."""

    def outcome(self, summary: Mapping[str, Any]) -> None:
        """It is over."""

    def close(self) -> None:
        """No more is shown."""


class PlainDisplay(Display):
    """A line each second, and when the status changes, for logs."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last = ""
        self._next = 0.0

    def show(self, estimate: ProgressEstimate) -> None:
        now = time.monotonic()
        if estimate.status == self._last and now < self._next:
            return
        self._last, self._next = estimate.status, now + _LINE_SECONDS
        if estimate.pass_number:
            self.note(
                f"{estimate.fraction:4.0%}  {estimate.status}, pass {estimate.pass_number}, "
                f"{format_size(estimate.remaining)} remaining, dirtying {format_measured(estimate.dirty_rate)}, "
                f"sending {format_measured(estimate.page_rate)} ({format_rate(estimate.wire_rate)} on the wire), "
                f"{outlook(estimate)}"
            )
        else:
            self.note(f"{estimate.fraction:4.0%}  {estimate.status}")

    def note(self, text: str) -> None:
        print(printable(text), file=self._out, flush=True)

    def outcome(self, summary: Mapping[str, Any]) -> None:
        for line in outcome_lines(summary):
            self.note(line)


class LiveDisplay(Display):
    """A bar and a few figures, redrawn in place."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, markup=False)
        self._live: Live | None = None

    def show(self, estimate: ProgressEstimate) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=10, transient=True)
            self._live.start()
        self._live.update(self._render(estimate))

    def note(self, text: str) -> None:
        self._console.print(printable(text))

    def outcome(self, summary: Mapping[str, Any]) -> None:
        self.close()
        colour = {"completed": "green", "cancelled": "yellow"}.get(summary["status"], "red")
        first, *rest = outcome_lines(summary)
        self._console.print(first, style=f"bold {colour}")
        for line in rest:
            self._console.print(line)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self, estimate: ProgressEstimate) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._console.width
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text("migrating", style="bold"),
            ProgressBar(total=1.0, completed=estimate.fraction, width=_BAR_WIDTH),
            f"{estimate.fraction:4.0%}",
        )
        dirty_rate, page_rate = estimate.dirty_rate or 0.0, estimate.page_rate or 0.0
        scale = max(dirty_rate, page_rate, 1.0)
        losing = estimate.converges is False
        rates = Table.grid(padding=(0, 1))
        for name, rate, text, colour in (
            ("dirtying", dirty_rate, format_measured(estimate.dirty_rate), "red" if losing else "yellow"),
            ("sending", page_rate, format_measured(estimate.page_rate), "green"),
        ):
            rates.add_row(
                name,
                ProgressBar(
                    total=scale,
                    completed=rate,
                    width=_RATE_WIDTH,
                    complete_style=colour,
                    finished_style=colour,
                ),
                text,
            )
        figures = (
            f"pass {estimate.pass_number}",
            f"{format_size(estimate.remaining)} of {format_size(estimate.total)} remaining",
        )
        wire = (
            f"on the wire: {format_size(estimate.transferred)} sent",
            f"{format_rate(estimate.wire_rate)} now",
        )
        lines = [Text(line) for line in (_fitted(figures, width), _fitted(wire, width))]
        style = "bold red" if losing else "dim"
        return Group(bar, lines[0], rates, lines[1], Text(outlook(estimate), style=style))


def _fitted(parts: tuple[str, ...], width: int) -> str:
    """Parts on one line, further apart where there is room."""
    wide = "   ".join(parts)
    return wide if len(wide) <= width else ", ".join(parts)


def outcome_lines(summary: Mapping[str, Any]) -> list[str]:
    """The outcome and, of a completed migration, its figures. Each is one line, whatever a VM says."""
    lines = [outcome_line(summary)]
    if summary["status"] == "completed":
        passes = f"{len(summary['passes'])} passes, " if summary["passes"] else ""
        lines.append(
            f"total {format_seconds((summary['total_ms'] or 0) / 1000)}, {passes}"
            f"{format_size(summary['transferred_bytes'] or 0)} sent, downtime {summary['downtime_ms']} ms"
            + (f" (predicted {summary['predicted_downtime_ms']})" if summary["predicted_downtime_ms"] else "")
        )
    if summary["clock_note"]:
        lines.append(summary["clock_note"])
    if text := farewell(summary):
        lines.append(text)
    return [printable(line) for line in lines]


def choose_display(*, json: bool) -> Display:
    """Nothing for machines, the live display on a terminal, lines otherwise."""
    if json:
        return Display()
    drawn = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return LiveDisplay() if drawn else PlainDisplay(sys.stderr)
