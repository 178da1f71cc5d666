"""The plots of a report. Each takes plain data and gives an `svg` element, or nothing when there is nothing to show."""

import itertools
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from sterna.report.figures import PassFigures
from sterna.report.svg import WIDTH, Chart, Scale, drawing, element, label, number
from sterna.testbed.evidence import HeatMapRecord, HugePages

_MB = 1e6
_PASSES_SHOWN = 40
_BAR_HEIGHT, _BAR_GAP = 18, 8
_NAME_WIDTH = 150
_HEAT_COLUMNS = 64
_HEAT_CELL = 8.4


def remaining_plot(points: Sequence[tuple[float, float]]) -> Markup:
    """:param points: seconds, bytes of RAM to be sent"""
    if len(points) < 2:
        return Markup()
    shown = [(x, y / _MB) for x, y in points]
    seconds = shown[-1][0]
    top = max(y for _, y in shown)
    chart = Chart(
        "Remaining RAM",
        f"From {number(top)} MB at the start to {number(shown[-1][1])} MB after {number(seconds)} s",
        Scale.over(x for x, _ in shown),
        Scale.over(y for _, y in shown),
        "seconds since the first pass began",
        "MB to be sent",
    )
    chart.curve(shown)
    return chart.render()


def rates_plot(passes: Sequence[PassFigures]) -> Markup:
    """Three bars for each pass: how fast RAM was dirtied, how fast it was sent, and what that took on the wire."""
    shown = list(passes)[-_PASSES_SHOWN:]
    if not shown:
        return Markup()
    rates = [(one, (one.dirty_rate or 0.0) / _MB, one.page_rate / _MB, one.bandwidth / _MB) for one in shown]
    dirtiest, fastest, widest = (max(column) for column in list(zip(*rates, strict=True))[1:])
    first, last = shown[0].number, shown[-1].number
    chart = Chart(
        "RAM dirtied and sent per pass",
        f"Passes {first} to {last}; at most {number(dirtiest)} MB/s of RAM dirtied, {number(fastest)} MB/s of RAM sent, "
        f"{number(widest)} MB/s on the wire",
        Scale(first - 0.5, last + 0.5, ()),
        Scale.over(rate for _, *all_rates in rates for rate in all_rates),
        "pass",
        "MB/s",
        [(one.number, str(one.number)) for one in shown],
    )
    for one, dirtied, sent, wire in rates:
        at = one.number
        if one.dirty_rate is not None:
            text = f"pass {at}: {number(dirtied)} MB/s of RAM dirtied"
            chart.bar(at - 0.38, at - 0.14, dirtied, 2, text)
        ms = number(one.seconds * 1000)
        text = f"pass {at}: {number(sent)} MB/s of RAM sent, {number(one.done / _MB)} MB in {ms} ms"
        chart.bar(at - 0.12, at + 0.12, sent, 1, text)
        text = f"pass {at}: {number(wire)} MB/s on the wire, {number(one.sent / _MB)} MB in {ms} ms"
        chart.bar(at + 0.14, at + 0.38, wire, 3, text)
    return chart.render()


def downtime_plot(rows: Sequence[tuple[str, Mapping[str, float]]]) -> Markup:
    """A bar for each migration, cut into the parts of its downtime.

    :param rows: name, and ms by part
    """
    rows = [(name, parts) for name, parts in rows if sum(parts.values()) > 0]
    if not rows:
        return Markup()
    longest = max(sum(parts.values()) for _, parts in rows)
    scale = Scale.over([longest])
    left, right = _NAME_WIDTH, WIDTH - 58
    height = len(rows) * (_BAR_HEIGHT + _BAR_GAP) + 42
    bottom = height - 38
    names = list(dict.fromkeys(part for _, parts in rows for part in parts))
    body = []
    for tick in scale.ticks:
        x = left + scale.at(tick) * (right - left)
        body.append(element("line", class_="grid", x1=x, x2=x, y1=2, y2=bottom))
        body.append(label(x, bottom + 15, number(tick), "middle"))
    body.append(label((left + right) // 2, height - 5, "ms that the guest stood still", "middle"))
    for row, (name, parts) in enumerate(rows):
        y = 4 + row * (_BAR_HEIGHT + _BAR_GAP)
        body.append(label(left - 8, y + 13, name[:26], "end"))
        x = float(left)
        for part, ms in parts.items():
            width = ms / scale.high * (right - left)
            if width < 0.2:
                continue
            tip, kind = f"{name}: {part} {number(ms)} ms", f"bar s{names.index(part) + 1}"
            body.append(element("rect", tip=tip, class_=kind, x=x, y=y, width=width, height=_BAR_HEIGHT))
            x += width
        body.append(element("text", number(sum(parts.values())), class_="value", x=x + 5, y=y + 13))
    summary = "; ".join(f"{name} {number(sum(parts.values()))} ms" for name, parts in rows[:8])
    return drawing("Downtime by part", summary, height, body)


def huge_pages_plot(
    samples: Sequence[HugePages], before: int | None, cancels: Sequence[float] = ()
) -> Markup:
    """:param cancels: when migrations were cancelled"""
    if len(samples) < 2:
        return Markup()
    zero = samples[0].at
    points: list[tuple[float, float]] = []
    for sample in samples:
        if points:
            points.append((sample.at - zero, points[-1][1]))
        points.append((sample.at - zero, sample.blocks))
    least = min(sample.blocks for sample in samples)
    chart = Chart(
        "Huge pages over time",
        f"{samples[0].blocks} at first, {least} at the least, {samples[-1].blocks} at last, in {len(samples)} looks",
        Scale.over([points[-1][0]]),
        Scale.over([*(y for _, y in points), before or 0], whole=True),
        "seconds",
        "mappings of 2 MiB in stage 2",
    )
    chart.curve(points)
    chart.ticks_below([at - zero for at in cancels], "event", "migrate_cancel")
    if before:
        chart.level(before, f"before: {before}")
    return chart.render()


def ping_plot(
    pings: Sequence[tuple[float, float | None]], migrations: Sequence[tuple[float, float]] = ()
) -> Markup:
    """Round trips over time; pings that were lost along the bottom.

    :param pings: seconds when it was sent, seconds that it took or None when it was lost
    :param migrations: begin and end, seconds
    """
    if len(pings) < 2:
        return Markup()
    zero = pings[0][0]
    answered = [(at - zero, rtt * 1000) for at, rtt in pings if rtt is not None]
    lost = [at - zero for at, rtt in pings if rtt is None]
    slowest = max((ms for _, ms in answered), default=0.0)
    chart = Chart(
        "Pings",
        f"{len(pings)} sent, {len(lost)} lost, the slowest answer after {number(slowest)} ms",
        Scale.over([pings[-1][0] - zero]),
        Scale.over([slowest]),
        "seconds",
        "round trip, ms",
    )
    for begin, end in migrations:
        chart.band(
            begin - zero, end - zero, f"migration from {number(begin - zero)} s to {number(end - zero)} s"
        )
    chart.dots([(x, ms, f"{number(ms)} ms at {number(x)} s") for x, ms in answered])
    chart.ticks_below(lost, "lost", "lost")
    return chart.render()


def heat_plot(heat: HeatMapRecord) -> Markup:
    """A cell for each stretch of RAM, from its start, row by row: the stronger, the more often its pages were sent."""
    if not heat.sent:
        return Markup()
    means = [
        sent / min(heat.pages_per_cell, heat.pages - index * heat.pages_per_cell)
        for index, sent in enumerate(heat.sent)
    ]
    hottest = max(means)
    columns = min(_HEAT_COLUMNS, len(means))
    rows = -(-len(means) // columns)
    left, top = 8, 4
    height = round(top + rows * _HEAT_CELL + 8)
    kib = heat.pages_per_cell * 4
    size = f"{kib / 1024:g} MiB" if kib >= 1024 else f"{kib} KiB"
    body = []
    for row in range(rows):
        start = row * columns
        cells = list(zip(means, heat.most, strict=True))[start : start + columns]
        column = 0
        # Neighbours alike are one rectangle: most of RAM is.
        for (mean, most), alike in itertools.groupby(cells):
            count = len(list(alike))
            # The first time is no resending: the scale begins there.
            strength = max(0.0, (mean - 1) / (hottest - 1)) if hottest > 1 else 0.0
            first = (start + column) * heat.pages_per_cell
            last = min(heat.pages, first + count * heat.pages_per_cell) - 1
            tip = f"pages {first} to {last}: sent {number(mean)} times, a page at most {most} times"
            x, y = left + column * _HEAT_CELL, top + row * _HEAT_CELL
            width, opacity = count * _HEAT_CELL, f"{0.07 + 0.93 * strength:.2f}"
            style = {"class_": "heat", "fill_opacity": opacity}
            body.append(element("rect", tip=tip, **style, x=x, y=y, width=width, height=_HEAT_CELL - 0.8))
            column += count
    summary = (
        f"{heat.block}: {len(means)} cells of {size}; pages of the hottest were sent {number(hottest)} times on average, "
        f"and {max(heat.most)} times at most"
    )
    return drawing("How often pages were sent", summary, height, body)
