"""The progress bar never runs backwards, and the outlook follows the rates."""

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.cli.display import LiveDisplay, PlainDisplay, outlook
from sterna.cli.progressestimate import ProgressEstimate, ProgressEstimator
from sterna.cli.result import summarise

MIB = 1 << 20


def answer(
    status: str,
    number: int,
    remaining: int,
    *,
    seconds: float = 1.0,
    done: int = 0,
    mbps: float = 1000.0,
    dirty: int = 0,
) -> dict[str, Any]:
    """Of query-migrate, for 1 GiB of RAM.

    :param seconds: since the migration began
    :param done: bytes of guest RAM in pages that were dealt with
    """
    return {
        "status": status,
        "total-time": round(seconds * 1000),
        "ram": {
            "dirty-sync-count": number,
            "remaining": remaining,
            "total": 1024 * MIB,
            "transferred": 5,
            "mbps": mbps,
            "dirty-pages-rate": dirty,
            "page-size": 4096,
            "normal": done // 4096,
            "duplicate": 0,
        },
    }


answers = st.builds(
    answer,
    st.sampled_from(["setup", "active", "device", "cancelling"]),
    st.integers(0, 50),
    st.integers(0, 1024 * MIB),
    seconds=st.floats(0, 1e6),
    done=st.integers(0, 1 << 50),
    mbps=st.floats(0, 1e6),
    dirty=st.integers(0, 10**7),
)


@given(st.lists(answers, max_size=30), st.integers(0, 2_000_000))
def test_never_backwards_whatever_is_answered(history: list[dict[str, Any]], downtime_limit_ms: int) -> None:
    estimator = ProgressEstimator(downtime_limit_ms)
    before = 0.0
    for info in [{"status": "setup"}, *history]:
        estimate = estimator.update(info)
        assert before <= estimate.fraction < 1
        assert estimate.eta_seconds is None or estimate.eta_seconds >= 0
        assert outlook(estimate)
        before = estimate.fraction
    assert estimator.update(answer("completed", 99, 0)).fraction == 1


def run(dirty_ratio: float, passes: int, wire: float = 1.0) -> list[ProgressEstimate]:
    """A migration that deals with 125 MB/s of guest RAM, whose guest dirties at this ratio of it; four pictures a pass.

    :param wire: bytes of the stream for each byte of guest RAM
    """
    estimator = ProgressEstimator(100)
    estimates = []
    size = 1024.0 * MIB
    done = 0.0
    for number in range(1, passes + 1):
        dirty = round(125e6 * dirty_ratio / 4096) if number > 1 else 0
        for quarter in range(4):
            remaining = round(size * (1 - quarter / 4))
            info = answer(
                "active",
                number,
                remaining,
                seconds=done / 125e6,
                done=round(done),
                mbps=1000 * wire,
                dirty=dirty,
            )
            estimates.append(estimator.update(info))
            done += size / 4
        size *= dirty_ratio
    return estimates


def test_a_migration_that_converges_advances_with_every_picture() -> None:
    estimates = run(0.5, 6)
    fractions = [estimate.fraction for estimate in estimates]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) == len(fractions)
    assert fractions[-1] <= 0.95
    assert all(estimate.converges for estimate in estimates if estimate.pass_number > 1)


def test_the_estimate_is_the_time_that_is_left() -> None:
    estimates = run(0.5, 9)
    second = next(estimate for estimate in estimates if estimate.pass_number == 2)
    # 512 MiB, then half each time, until 12.5 MB are left: 512 + 256 + ... + 16 MiB.
    assert second.eta_seconds is not None
    assert abs(second.eta_seconds - 1008 * MIB / 125e6) < 0.1
    assert outlook(second).startswith("switchover in 8.5 s")


def test_a_migration_that_does_not_converge_says_why_and_stands_still() -> None:
    estimates = run(1.2, 6)
    later = [estimate for estimate in estimates if estimate.pass_number > 2]
    assert {estimate.converges for estimate in later} == {False}
    assert {estimate.eta_seconds for estimate in later} == {None}
    assert len({estimate.fraction for estimate in later}) == 1
    assert outlook(later[0]) == "will not converge"


def test_a_fast_writer_with_little_memory_converges_nonetheless() -> None:
    estimator = ProgressEstimator(300)
    estimator.update(answer("active", 1, 1024 * MIB, seconds=0))
    estimate = estimator.update(answer("active", 2, 4 * MIB, seconds=8, done=1000 * MIB, dirty=10**6))
    assert estimate.converges is True


@pytest.mark.parametrize("wire", [0.001, 1.0])
def test_forecasts_count_pages_whatever_they_take_on_the_wire(wire: float) -> None:
    estimates = run(0.5, 9, wire)
    first = estimates[1]
    assert first.eta_seconds == pytest.approx(768 * MIB / 125e6, rel=0.01)
    second = next(estimate for estimate in estimates if estimate.pass_number == 2)
    assert second.eta_seconds == pytest.approx(1008 * MIB / 125e6, rel=0.01)
    assert {estimate.converges for estimate in estimates if estimate.pass_number > 1} == {True}
    assert first.wire_rate == pytest.approx(125e6 * wire)


def test_pages_that_were_sent_as_what_changed_count_as_sent() -> None:
    for extra in ({"xbzrle-cache": {"pages": 51_200, "overflow": 0}}, {"x-sterna": {"saved-pages": 51_200}}):
        estimator = ProgressEstimator(300)
        estimator.update(answer("active", 2, 400 * MIB, seconds=10, done=1024 * MIB))
        estimate = estimator.update(answer("active", 2, 200 * MIB, seconds=12, done=1024 * MIB) | extra)
        assert estimate.page_rate == 100 * MIB


def test_the_first_second_has_no_forecast() -> None:
    estimator = ProgressEstimator(300)
    for seconds in (0.1, 0.3, 0.7, 1.0):
        estimate = estimator.update(answer("active", 1, 1000 * MIB, seconds=seconds, done=24 * MIB))
        assert (estimate.page_rate, estimate.eta_seconds) == (None, None)
        assert outlook(estimate) == "measuring"
    estimate = estimator.update(answer("active", 1, 500 * MIB, seconds=1.1, done=524 * MIB))
    assert estimate.page_rate == 500 * MIB
    assert estimate.eta_seconds == 1.0


def test_the_first_pass_has_no_dirty_rate_and_ends_at_the_rate_shown() -> None:
    estimator = ProgressEstimator(300)
    estimator.update(answer("active", 1, 700 * MIB, seconds=0, done=0))
    estimate = estimator.update(answer("active", 1, 500 * MIB, seconds=2, done=200 * MIB, mbps=8.0))
    assert estimate.dirty_rate is None
    assert estimate.eta_seconds == 5.0
    out = io.StringIO()
    PlainDisplay(out).show(estimate)
    assert "dirtying —, sending 104.9 MB/s (1.0 MB/s on the wire), pass 1 done in 5.0 s" in out.getvalue()


def test_a_limit_is_no_prediction() -> None:
    """QEMU says its limit until it has made one."""
    estimator = ProgressEstimator(300)
    for expected, shown in ((300, None), (41, 41)):
        info = answer("active", 2, 4 * MIB) | {"expected-downtime": expected}
        assert estimator.update(info).expected_downtime_ms == shown
    for own, shown in (({}, None), ({"predicted-downtime-ms": 300.4}, 300)):
        info = answer("active", 2, 4 * MIB) | {"expected-downtime": 300, "x-sterna": own}
        assert estimator.update(info).expected_downtime_ms == shown


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_of_the_display_is_wider_than_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a terminal wraps, nothing takes back."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    error = io.StringIO()
    error.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", error)
    estimates = [*run(0.5, 3), *run(1.2, 3)]
    with LiveDisplay() as display:
        for estimate in estimates:
            display.show(replace(estimate, remaining=1023 << 20, total=1023 << 30, transferred=1023 << 20))
            assert display._live is not None
            display._live.refresh()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", error.getvalue()).replace("\r", "\n").split("\n")
    assert max(len(line.rstrip()) for line in lines) <= width
    assert max(len(line) for line in lines) <= width
    text = " ".join(" ".join(lines).split())
    for expected in ("migrating", "dirtying", "sending", "remaining", "on the wire", "will not converge"):
        assert expected in text or width < 40
    drawn = {int(number) for number in re.findall(r"(\d+)%", text)}
    assert drawn >= {round(100 * estimate.fraction) for estimate in estimates}


def after_pass(sent: int, left: int, throttle: int = 0) -> ProgressEstimate:
    """The second pass at 125 MB/s, of a guest that seemed to dirty 120 MB/s; pages."""
    estimator = ProgressEstimator(100)
    estimator.update(answer("active", 1, 1024 * MIB, seconds=0))
    dirty = 29_297 if left > sent // 2 else 1000
    info = answer("active", 2, left * 4096, seconds=2, done=250_000_000, dirty=dirty)
    info["x-sterna"] = {"passes": [{"pages": sent, "dirty_pages_after": left}]}
    info["cpu-throttle-percentage"] = throttle
    return estimator.update(info)


def test_a_pass_that_gains_nothing_has_no_estimate() -> None:
    estimate = after_pass(100_000, 90_000)
    assert estimate.converges is False
    assert estimate.eta_seconds is None
    assert outlook(estimate) == "will not converge"
    assert outlook(after_pass(100_000, 90_000, throttle=60)) == "throttling the guest by 60 %"


def test_a_pass_that_gains_has_one() -> None:
    estimate = after_pass(100_000, 40_000)
    assert estimate.converges is True
    assert outlook(estimate).startswith("switchover in ")


def test_no_text_of_a_vm_makes_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"clock-note": "late\nVERIFIED", "verdict": "no\nVERIFIED", "policy": "fixed"}
    info = {**answer("active", 3, MIB), "error-desc": "no\nVERIFIED", "x-sterna": own}
    out = io.StringIO()
    for display in (PlainDisplay(out), LiveDisplay()):
        for status in ("active", "st\nVERIFIED"):
            display.show(ProgressEstimator(300).update({**info, "status": status}))
        display.note("settings: a\nVERIFIED")
        for status in ("completed", "failed", "st\nVERIFIED"):
            display.outcome(summarise({**info, "status": status}))
    shown = out.getvalue() + capsys.readouterr().err
    assert shown.count("VERIFIED") >= 12
    assert not [line for line in shown.splitlines() if line.startswith("VERIFIED")]


def test_a_reason_is_shown_as_it_is_whatever_it_looks_like(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it looks like markup."""
    reason = "[/bold] no [red]room[/red]"
    display = LiveDisplay()
    display.outcome(summarise({"status": "failed", "error-desc": reason}))
    display.note(reason)
    assert capsys.readouterr().err.count(reason) == 2
