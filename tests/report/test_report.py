"""The page of a run: complete, harmless, and true to the evidence."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from sterna.report import plots
from sterna.report.figures import PassFigures, downtime_parts, passes, remaining
from sterna.report.page import Run, render
from sterna.report.svg import Scale, number
from sterna.testbed.checks import CheckVerdict, Finding
from sterna.testbed.evidence import (
    Blackout,
    CancelRecord,
    Evidence,
    FaultCase,
    HeatMapRecord,
    HugePages,
    MigrationRecord,
    ProgressSample,
)
from sterna.testbed.runner import Result, ScenarioOutcome

NASTY = "<script>alert('x')</script> & \"quoted\" \x00\udcff"
PAGE = 4096
INFO = {
    "status": "completed",
    "total-time": 400,
    "ram": {"transferred": 9_000_000, "dirty-sync-count": 3},
    "x-sterna": {
        "passes": [
            {"pages": 2000, "bytes": 8_000_000, "ms": 200.0, "dirty_pages_after": 300},
            {"pages": 300, "bytes": 900_000, "ms": 30.0, "dirty_pages_after": 20},
            {"pages": 20, "bytes": 100_000, "ms": 10.0, "dirty_pages_after": 0},
        ],
        "downtime-parts": {"stop": 1.0, "last-pass": 10.0, "device-state": 2.0, "start": 0.5},
    },
}


def record(**changes: Any) -> MigrationRecord:
    return MigrationRecord("guest", "load", "host1", "host2", 0.0, **({"info": INFO} | changes))


def moments(*rows: tuple[float, int, int, int, int]) -> list[ProgressSample]:
    return [
        ProgressSample(at, "active", number, transferred, remaining, rate, 0.0)
        for at, number, transferred, remaining, rate in rows
    ]


class Checker(HTMLParser):
    """Tags are closed in order; nothing is loaded or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attributes:
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "data")
            assert name != "href" or (value or "").startswith("#")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert not {"script", "link", "img", "iframe"} & set(checker.counts)
    assert "@import" not in page
    assert "url(" not in page
    return checker


def full(text: str) -> Result:
    heat = HeatMapRecord(text, 8, 4, [4, 12], [1, 5])
    evidence = Evidence(
        passages=[
            record(heat=[heat], blackout=Blackout(1, 2, 3, 0.5)),
            MigrationRecord(text, text, text, text, 0.0, info=INFO),
            record(info={"status": "failed", "error-desc": text}),
        ],
        huge_pages=[HugePages(0, 5, 0), HugePages(1, 1, 9), HugePages(2, 5, 0)],
        blocks_before=5,
        cancelled=[CancelRecord(0.5, 0.5, 100, text, 3.0, True, None, 5)],
        injured=[FaultCase(text, text, text, [text], [text], False, 5, [text], text)],
        reclaimed={text: 5.0},
    )
    finding = Finding(text, text, CheckVerdict.FAILED, text, {}, [text])
    return Result("x", text, "emulated", ScenarioOutcome.FAILED, 2.0, [finding], evidence, text, text)


def test_whatever_it_says_the_page_is_whole_and_harmless() -> None:
    page = render([full(NASTY)], Run(0.0, 3.0))
    checker = checked(page)
    assert "<script>" in checker.text
    assert checker.counts["svg"] == 7  # downtimes, huge pages; two passages with two plots and one heat map
    assert page.encode("utf-8", "replace")


def test_every_claim_is_there_with_its_figure_and_outcome() -> None:
    findings = [
        Finding("a", "claim one", CheckVerdict.PASSED, "figure one"),
        Finding("b", "claim two", CheckVerdict.FAILED, "figure two", {}, ["what was wrong"]),
    ]
    results = [
        Result("first", "title one", "kvm", ScenarioOutcome.FAILED, 1.0, findings),
        Result(
            "second",
            "title two",
            "kvm",
            ScenarioOutcome.SKIPPED,
            1.0,
            reason="no such device",
            note="all on loopback",
        ),
    ]
    checker = checked(render(results, Run(0.0, 2.0, reduced=True)))
    for text in ("claim one", "figure one", "claim two", "figure two", "what was wrong", "no such device"):
        assert text in checker.text
    assert "2 scenarios with 2 claims: 1 failed, 1 skipped" in checker.text
    assert "kvm, reduced scenarios" in checker.text
    assert "all on loopback" in checker.text


def test_a_run_of_nothing_has_a_page() -> None:
    checked(render([], Run(0.0, 0.0)))
    checked(render([Result("x", "t", "qemu", ScenarioOutcome.ERROR, 0.0, reason="broke")], Run(0.0, 0.0)))


def test_the_sources_own_passes() -> None:
    first, second, last = passes(record())
    assert first == PassFigures(1, 0.0, 0.2, 2000 * PAGE, 2000 * PAGE, 8_000_000, 300 * PAGE)
    assert first.bandwidth == pytest.approx(40e6)
    assert first.page_rate == pytest.approx(10_000 * PAGE)
    assert first.dirty_rate == pytest.approx(1500 * PAGE)
    assert (second.number, second.began) == (2, pytest.approx(0.2))
    assert (last.number, last.dirtied, last.dirty_rate) == (3, None, None)
    points = remaining(record())
    assert points[:3] == [(0.0, 2000 * PAGE), (0.2, 0.0), (0.2, 300 * PAGE)]
    # Of more passes than are remembered, the last ones.
    assert passes(record(info=INFO | {"ram": {"dirty-sync-count": 1003}}))[0].number == 1001


def test_passes_seen_from_outside() -> None:
    looked = moments(
        (1.0, 0, 0, 0, 0),
        (1.1, 1, 0, 9000, 0),
        (1.3, 1, 5000, 4000, 0),
        (1.6, 2, 9000, 800, 7),
        (1.7, 2, 9500, 300, 7),
    )
    seen = record(info={"status": "completed"}, moments=looked)
    first, last = passes(seen)
    assert (first.number, first.due, first.sent) == (1, 9000, 9000)
    assert first.seconds == pytest.approx(0.5)
    assert first.dirty_rate == pytest.approx(7 * PAGE, rel=0.01)
    assert (last.number, last.sent, last.seconds) == (2, 500, pytest.approx(0.1))
    assert (first.done, last.done) == (9000, 500)
    assert remaining(seen)[0] == (0.0, 9000.0)
    assert len(remaining(seen)) == 4
    assert passes(record(info={}, moments=[])) == []


def rectangles(svg: str, kind: str) -> list[dict[str, float]]:
    found = []
    for text in re.findall(rf'<rect class="{kind}"([^>]*)>', svg):
        found.append({name: float(value) for name, value in re.findall(r'([\w-]+)="([\d.]+)"', text)})
    return found


def test_bars_are_as_high_as_their_rates() -> None:
    svg = plots.rates_plot(passes(record()))
    sent, wire = rectangles(svg, "bar s1"), rectangles(svg, "bar s3")
    assert len(sent) == len(wire) == 3
    assert len(rectangles(svg, "bar s2")) == 2
    first, second, _ = passes(record())
    assert wire[0]["height"] / wire[1]["height"] == pytest.approx(40 / 30, rel=0.02)
    assert sent[0]["height"] / wire[0]["height"] == pytest.approx(first.page_rate / 40e6, rel=0.02)
    assert sent[0]["height"] / sent[1]["height"] == pytest.approx(
        first.page_rate / second.page_rate, rel=0.02
    )
    assert "pass 1: 40.96 MB/s of RAM sent, 8.192 MB in 200 ms" in svg
    assert "pass 1: 40 MB/s on the wire, 8 MB in 200 ms" in svg
    assert plots.rates_plot([]) == ""


def test_downtimes_are_cut_to_scale() -> None:
    parts = downtime_parts(record())
    assert parts == {"devices stopped": 1.0, "last pages": 10.0, "device state": 2.0, "start": 0.5}
    svg = plots.downtime_plot([("a", parts), ("b", {"last pages": 5.0}), ("gone", {})])
    widths = [rectangle["width"] for rectangle in rectangles(svg, "bar s2")]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.02)
    assert ">13.5</text>" in svg
    assert "gone" not in svg
    assert plots.downtime_plot([]) == ""


def test_huge_pages_go_and_come_back() -> None:
    looks = [HugePages(10, 5, 0), HugePages(11, 1, 9), HugePages(12, 5, 0)]
    svg = plots.huge_pages_plot(looks, 5, [11.0])
    assert "5 at first, 1 at the least, 5 at last, in 3 looks" in svg
    assert svg.count('class="event"') == 1
    assert "before: 5" in svg
    assert plots.huge_pages_plot(looks[:1], 5) == ""


def test_lost_pings_are_marked() -> None:
    pings = [(10.0, 0.001), (10.1, None), (10.2, 0.25), (10.3, None)]
    svg = plots.ping_plot(pings, [(10.05, 10.2)])
    assert "4 sent, 2 lost, the slowest answer after 250 ms" in svg
    assert svg.count('class="lost"') == 2
    assert svg.count("<circle") == 2
    [band] = rectangles(svg, "band")
    assert band["width"] > 100
    assert plots.ping_plot([]) == ""
    assert "2 lost" in plots.ping_plot([(0.0, None), (1.0, None)])


def test_the_heat_map_shows_what_was_sent_again() -> None:
    svg = plots.heat_plot(HeatMapRecord("ram", 10, 4, [4, 12, 10], [1, 4, 5]))
    cells = rectangles(svg, "heat")
    assert [cell["fill-opacity"] for cell in cells] == [0.07, pytest.approx(0.535, abs=0.006), 1.0]
    assert "pages 8 to 9: sent 5 times, a page at most 5 times" in svg
    calm = plots.heat_plot(HeatMapRecord("ram", 4096, 4, [4] * 1024, [1] * 1024))
    assert len(rectangles(calm, "heat")) == 16  # rows; neighbours alike are one
    assert plots.heat_plot(HeatMapRecord("ram", 0, 1, [], [])) == ""


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([9.3], (0, 2, 4, 6, 8, 10)),
        ([0.013], (0, 0.005, 0.01, 0.015)),
        ([], (0, 1)),
        ([float("nan")], (0, 1)),
    ],
)
def test_scales_count_as_people_do(values: list[float], ticks: tuple[float, ...]) -> None:
    assert Scale.over(values).ticks == pytest.approx(ticks)


def test_whole_numbers_are_marked_whole() -> None:
    assert Scale.over([3], whole=True).ticks == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12.5, "12.5"), (0.25, "0.25"), (1240.4, "1\u202f240"), (0.0123, "0.012"), (99.999, "100"), (0.0004, "0.0004")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
