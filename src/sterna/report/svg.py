"""Charts as SVG text: one value axis, one horizontal axis, marks with tooltips. Colours are classes of the page's style sheet."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 560, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 26, 40
_TICKS = 5
_LABEL_PX = 6.6
"""About the width of a digit of an axis label."""


@dataclass(frozen=True)
class Scale:
    """An axis from a value to a value, in steps that people count in.

    :ivar ticks: from `low` to `high`
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    @staticmethod
    def over(values: Iterable[float], *, whole: bool = False) -> "Scale":
        """From 0 to a little above the largest value.

        :param whole: only whole numbers are marked
        """
        top = max((value for value in values if math.isfinite(value)), default=0.0)
        if top <= 0:
            return Scale(0.0, 1.0, (0.0, 1.0))
        rough = top / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
        if whole:
            step = max(1.0, math.ceil(step))
        count = math.ceil(top / step - 1e-9)
        return Scale(0.0, step * count, tuple(step * i for i in range(count + 1)))

    def at(self, value: float) -> float:
        """Where a value is, as a part of the axis."""
        return (value - self.low) / (self.high - self.low)


def number(value: float) -> str:
    """Four digits at most, no exponent: ``0.25``, ``12.5``, ``1 240``."""
    if value and abs(value) < 0.001:
        return f"{value:.1g}"
    digits = 0 if abs(value) >= 1000 else 3 - max(0, math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}".replace(",", "\u202f")
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass
class Chart:
    """A chart that grows by its marks; `render` makes the text.

    :ivar title: what it shows
    :ivar summary: the same in words, for those who cannot see it
    """

    title: str
    summary: str
    x: Scale
    y: Scale
    x_label: str
    y_label: str
    height: int = HEIGHT
    _marks: list[str] = field(default_factory=list)
    _x_labels: list[tuple[float, str]] | None = None

    # -- where things are ------------------------------------------------------------------------------------

    def px(self, value: float) -> float:
        return _LEFT + self.x.at(value) * (WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        return self.height - _BOTTOM - self.y.at(value) * (self.height - _TOP - _BOTTOM)

    # -- marks -----------------------------------------------------------------------------------------------

    def line(self, points: Sequence[tuple[float, float]], series: int) -> None:
        """A line through points in the order given."""
        if points:
            path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
            self._marks.append(f'<polyline class="line s{series}" points="{path}"/>')

    def area(self, points: Sequence[tuple[float, float]], series: int) -> None:
        """What is under a line."""
        if points:
            base = self.py(self.y.low)
            path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
            ends = f"{self.px(points[-1][0]):.1f},{base:.1f} {self.px(points[0][0]):.1f},{base:.1f}"
            self._marks.append(f'<polygon class="area s{series}" points="{path} {ends}"/>')

    def dots(self, points: Sequence[tuple[float, float, str]], series: int) -> None:
        """Points, each with what its tooltip says."""
        for x, y, text in points:
            self._marks.append(
                f'<circle class="dot s{series}" cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="2.4">'
                f"<title>{escape(text)}</title></circle>"
            )

    def bar(self, left: float, right: float, value: float, series: int, text: str) -> None:
        """A bar from the axis up to `value`, between two places on the horizontal axis."""
        x, top, base = self.px(left), self.py(value), self.py(self.y.low)
        self._marks.append(
            f'<rect class="bar s{series}" x="{x:.1f}" y="{top:.1f}" width="{max(1.0, self.px(right) - x):.1f}" '
            f'height="{max(0.0, base - top):.1f}"><title>{escape(text)}</title></rect>'
        )

    def ticks_below(self, xs: Sequence[float], kind: str, text: str) -> None:
        """Short strokes along the bottom of the chart."""
        base = self.py(self.y.low)
        for x in xs:
            self._marks.append(
                f'<line class="{kind}" x1="{self.px(x):.1f}" x2="{self.px(x):.1f}" y1="{base:.1f}" '
                f'y2="{base - 14:.1f}"><title>{escape(text)}</title></line>'
            )

    def band(self, left: float, right: float, text: str) -> None:
        """A stretch of the horizontal axis that something happened in."""
        x = self.px(left)
        self._marks.append(
            f'<rect class="band" x="{x:.1f}" y="{_TOP}" width="{max(1.5, self.px(right) - x):.1f}" '
            f'height="{self.height - _TOP - _BOTTOM}"><title>{escape(text)}</title></rect>'
        )

    def level(self, value: float, text: str) -> None:
        """A dashed line at a value, named."""
        y = self.py(value)
        self._marks.append(
            f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        self._marks.append(
            f'<text class="label" x="{WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(text)}</text>'
        )

    def name_places(self, labels: Sequence[tuple[float, str]]) -> None:
        """Names on the horizontal axis in place of numbers."""
        self._x_labels = list(labels)

    # -- text ------------------------------------------------------------------------------------------------

    def render(self) -> str:
        """The whole `svg` element."""
        parts = [open_svg(self.title, self.summary, WIDTH, self.height)]
        for tick in self.y.ticks:
            y = self.py(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="label" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
            )
        parts.append(f'<text class="label" x="4" y="13">{escape(self.y_label)}</text>')
        parts += self._marks
        base = self.height - _BOTTOM
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
        labels = self._x_labels
        if labels is None:
            labels = [(tick, number(tick)) for tick in self.x.ticks]
        for x, text in _thinned([(self.px(value), text) for value, text in labels]):
            anchor = "end" if x + len(text) * _LABEL_PX / 2 > WIDTH else "middle"
            at = WIDTH - 2 if anchor == "end" else x
            parts.append(
                f'<text class="label" x="{at:.1f}" y="{base + 16}" text-anchor="{anchor}">{escape(text)}</text>'
            )
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(
            f'<text class="label" x="{middle:.0f}" y="{self.height - 6}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        return "".join([*parts, "</svg>"])


def open_svg(title: str, summary: str, width: int, height: int) -> str:
    """The start of an `svg` element with its text for screen readers."""
    label = escape(f"{title}. {summary}")
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">'


def _thinned(labels: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those that leave each other room, of labels by their place in pixels."""
    kept: list[tuple[float, str]] = []
    free = -math.inf
    for x, text in labels:
        half = len(text) * _LABEL_PX / 2
        if x - half >= free:
            kept.append((x, text))
            free = x + half + 8
    return kept
