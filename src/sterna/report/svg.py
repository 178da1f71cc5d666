"""Charts as SVG text: one value axis, one horizontal axis, marks with tooltips. Colours are classes of the page's style sheet."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 26, 40
_BASE = HEIGHT - _BOTTOM
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


def element(tag: str, content: str = "", *, tip: str = "", **attributes: float | str) -> Markup:
    """An SVG element. All that is no markup itself is escaped; floats have one digit behind the point.

    :param tip: what its tooltip says
    :param attributes: by their names, with an underscore for a hyphen, and one at the end of a name that is Python's
    """
    told = ""
    for name, value in attributes.items():
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        told += f' {name.rstrip("_").replace("_", "-")}="{escape(text)}"'
    title = element("title", tip) if tip else ""
    return Markup(f"<{tag}{told}>{title}{escape(content)}</{tag}>")


def label(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    """Words or a figure beside a mark.

    :param anchor: which part of them is at x: start, middle or end
    """
    return element("text", text, class_="label", x=x, y=y, text_anchor=anchor)


def drawing(title: str, summary: str, height: int, parts: Iterable[Markup]) -> Markup:
    """The whole `svg` element, with its text for screen readers."""
    view = f"0 0 {WIDTH} {height}"
    return element("svg", Markup("").join(parts), role="img", aria_label=f"{title}. {summary}", viewBox=view)


@dataclass
class Chart:
    """A chart that grows by its marks; `render` makes the text.

    :ivar title: what it shows
    :ivar summary: the same in words, for those who cannot see it
    :ivar places: names on the horizontal axis, in place of numbers
    """

    title: str
    summary: str
    x: Scale
    y: Scale
    x_label: str
    y_label: str
    places: Sequence[tuple[float, str]] = ()
    _marks: list[Markup] = field(default_factory=list)

    # -- where things are ------------------------------------------------------------------------------------

    def px(self, value: float) -> float:
        return _LEFT + self.x.at(value) * (WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        return _BASE - self.y.at(value) * (_BASE - _TOP)

    # -- marks -----------------------------------------------------------------------------------------------

    def curve(self, points: Sequence[tuple[float, float]]) -> None:
        """A line through points in the order given, and what is under it."""
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        ends = f"{self.px(points[-1][0]):.1f},{_BASE:.1f} {self.px(points[0][0]):.1f},{_BASE:.1f}"
        self._marks.append(element("polygon", class_="area s1", points=f"{path} {ends}"))
        self._marks.append(element("polyline", class_="line s1", points=path))

    def dots(self, points: Sequence[tuple[float, float, str]]) -> None:
        """Points, each with what its tooltip says."""
        for x, y, tip in points:
            self._marks.append(
                element("circle", tip=tip, class_="dot s1", cx=self.px(x), cy=self.py(y), r=2.4)
            )

    def bar(self, left: float, right: float, value: float, series: int, tip: str) -> None:
        """A bar from the axis up to `value`, between two places on the horizontal axis."""
        x, top = self.px(left), self.py(value)
        width, height = max(1.0, self.px(right) - x), max(0.0, _BASE - top)
        kind = f"bar s{series}"
        self._marks.append(element("rect", tip=tip, class_=kind, x=x, y=top, width=width, height=height))

    def ticks_below(self, xs: Sequence[float], kind: str, tip: str) -> None:
        """Short strokes along the bottom of the chart."""
        for x in map(self.px, xs):
            self._marks.append(element("line", tip=tip, class_=kind, x1=x, x2=x, y1=_BASE, y2=_BASE - 14))

    def band(self, left: float, right: float, tip: str) -> None:
        """A stretch of the horizontal axis that something happened in."""
        x = self.px(left)
        width = max(1.5, self.px(right) - x)
        self._marks.append(
            element("rect", tip=tip, class_="band", x=x, y=_TOP, width=width, height=_BASE - _TOP)
        )

    def level(self, value: float, text: str) -> None:
        """A dashed line at a value, named."""
        y = self.py(value)
        self._marks += [_across("level", y), label(WIDTH - _RIGHT, y - 4, text, "end")]

    # -- text ------------------------------------------------------------------------------------------------

    def render(self) -> Markup:
        """The whole `svg` element."""
        parts = []
        for tick in self.y.ticks:
            y = self.py(tick)
            parts += [_across("grid", y), label(_LEFT - 7, y + 4, number(tick), "end")]
        parts += [label(4, 13, self.y_label), *self._marks, _across("axis", _BASE)]
        labels = self.places or [(tick, number(tick)) for tick in self.x.ticks]
        for x, text in _thinned([(self.px(value), text) for value, text in labels]):
            at_edge = x + len(text) * _LABEL_PX / 2 > WIDTH
            parts.append(label(WIDTH - 2 if at_edge else x, _BASE + 16, text, "end" if at_edge else "middle"))
        parts.append(label((_LEFT + WIDTH - _RIGHT) // 2, HEIGHT - 6, self.x_label, "middle"))
        return drawing(self.title, self.summary, HEIGHT, parts)


def _across(kind: str, y: float) -> Markup:
    """A line over the whole width of a chart."""
    return element("line", class_=kind, x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y)


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
