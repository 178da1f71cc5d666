"""The progress bar never runs backwards, and the outlook follows the rates."""

import io
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sterna.cli.display import PlainDisplay, outlook
from sterna.cli.progress import Picture, ProgressTracker

MIB = 1 << 20


def answer(
    status: str, number: int, remaining: int, *, mbps: float = 1000.0, dirty: int = 0
) -> dict[str, Any]:
    """Of query-migrate, for 1 GiB of RAM."""
    return {
        "status": status,
        "total-time": 1000,
        "ram": {
            "dirty-sync-count": number,
            "remaining": remaining,
            "total": 1024 * MIB,
            "transferred": 5,
            "mbps": mbps,
            "dirty-pages-rate": dirty,
            "page-size": 4096,
        },
    }


answers = st.builds(
    answer,
    st.sampled_from(["setup", "active", "device", "cancelling"]),
    st.integers(0, 50),
    st.integers(0, 1024 * MIB),
    mbps=st.floats(0, 1e6),
    dirty=st.integers(0, 10**7),
)


@given(st.lists(answers, max_size=30), st.integers(0, 2_000_000))
def test_never_backwards_whatever_is_answered(history: list[dict[str, Any]], downtime_limit_ms: int) -> None:
    tracker = ProgressTracker(downtime_limit_ms)
    before = 0.0
    for info in [{"status": "setup"}, *history]:
        picture = tracker.update(info)
        assert before <= picture.fraction < 1
        assert picture.eta_seconds is None or picture.eta_seconds >= 0
        assert outlook(picture)
        before = picture.fraction
    assert tracker.update(answer("completed", 99, 0)).fraction == 1


def run(dirty_ratio: float, passes: int) -> list[Picture]:
    """A migration at 125 MB/s whose guest dirties at this ratio of it; four pictures a pass."""
    tracker = ProgressTracker(100)
    pictures = []
    size = 1024.0 * MIB
    for number in range(1, passes + 1):
        dirty = round(125e6 * dirty_ratio / 4096) if number > 1 else 0
        for quarter in range(4):
            remaining = round(size * (1 - quarter / 4))
            pictures.append(tracker.update(answer("active", number, remaining, dirty=dirty)))
        size *= dirty_ratio
    return pictures


def test_a_migration_that_converges_advances_with_every_picture() -> None:
    pictures = run(0.5, 6)
    fractions = [picture.fraction for picture in pictures]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) == len(fractions)
    assert fractions[-1] <= 0.95
    assert all(picture.converges for picture in pictures if picture.pass_number > 1)


def test_the_estimate_is_the_time_that_is_left() -> None:
    pictures = run(0.5, 9)
    second = next(picture for picture in pictures if picture.pass_number == 2)
    # 512 MiB, then half each time, until 12.5 MB are left: 512 + 256 + ... + 16 MiB.
    assert second.eta_seconds is not None
    assert abs(second.eta_seconds - 1008 * MIB / 125e6) < 0.1
    assert outlook(second).startswith("switchover in 8.5 s")


def test_a_migration_that_does_not_converge_says_why_and_stands_still() -> None:
    pictures = run(1.2, 6)
    later = [picture for picture in pictures if picture.pass_number > 2]
    assert {picture.converges for picture in later} == {False}
    assert {picture.eta_seconds for picture in later} == {None}
    assert len({picture.fraction for picture in later}) == 1
    assert outlook(later[0]) == "will not converge"


def test_a_fast_writer_with_little_memory_converges_nonetheless() -> None:
    tracker = ProgressTracker(300)
    tracker.update(answer("active", 1, 1024 * MIB))
    picture = tracker.update(answer("active", 2, 4 * MIB, dirty=10**6))
    assert picture.converges is True


def test_the_first_pass_has_no_dirty_rate_and_ends_at_the_rate_shown() -> None:
    tracker = ProgressTracker(300)
    picture = tracker.update(answer("active", 1, 500 * MIB, mbps=800.0))
    assert picture.dirty_rate is None
    assert picture.eta_seconds == 500 * MIB / picture.transfer_rate == 500 * MIB / 100e6
    out = io.StringIO()
    PlainDisplay(out).show(picture)
    assert "dirtying —, sending 100.0 MB/s, pass 1 done in 5.2 s" in out.getvalue()


def after_pass(sent: int, left: int, throttle: int = 0) -> Picture:
    """The second pass at 125 MB/s, of a guest that seemed to dirty 120 MB/s; pages."""
    tracker = ProgressTracker(100)
    tracker.update(answer("active", 1, 1024 * MIB))
    info = answer("active", 2, left * 4096, dirty=29_297 if left > sent // 2 else 1000)
    info["x-sterna"] = {"passes": [{"pages": sent, "dirty_pages_after": left}]}
    info["cpu-throttle-percentage"] = throttle
    return tracker.update(info)


def test_a_pass_that_gains_nothing_has_no_estimate() -> None:
    picture = after_pass(100_000, 90_000)
    assert picture.converges is False
    assert picture.eta_seconds is None
    assert outlook(picture) == "will not converge"
    assert outlook(after_pass(100_000, 90_000, throttle=60)) == "throttling the guest by 60 %"


def test_a_pass_that_gains_has_one() -> None:
    picture = after_pass(100_000, 40_000)
    assert picture.converges is True
    assert outlook(picture).startswith("switchover in ")
