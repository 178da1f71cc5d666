"""The numbers a migration reports."""

import pytest

from sterna.migration.progress import IllegalTransition, Progress
from sterna.migration.statistics import Bandwidth, DowntimeParts, MigrationInfo, MigrationStatus
from sterna.migration.transport.sender import Sent


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_bandwidth_is_that_of_the_last_full_window() -> None:
    bandwidth = Bandwidth()
    bandwidth.add(1_000_000, 250, 1 / 32)
    assert bandwidth.bytes_per_second == pytest.approx(32e6), "the mean, until a window is full"
    for _ in range(3):
        bandwidth.add(1_000_000, 250, 1 / 32)
    for _ in range(3):
        bandwidth.add(10, 1, 1 / 32)
    assert bandwidth.bytes_per_second == pytest.approx(32e6), "part of a window does not count yet"
    bandwidth.add(10, 1, 1 / 32)
    assert bandwidth.bytes_per_second == pytest.approx(320)
    assert bandwidth.pages_per_second == pytest.approx(32)


def test_passes_add_up() -> None:
    clock = Clock()
    events: list[tuple[str, dict[str, object]]] = []
    progress = Progress(lambda name, data: events.append((name, data)), "tcp:x:1", clock=clock)
    progress.note(total=40 << 20)
    progress.enter(MigrationStatus.SETUP)
    clock.now += 0.2
    progress.set_up()
    progress.advance(MigrationStatus.ACTIVE)
    progress.begin_pass(10_240)
    progress.sent(Sent(size=4_000_000, pages=1000, zero_pages=0, seconds=0.1), final=False)
    progress.sent(Sent(size=90_000, pages=9240, zero_pages=9240, seconds=0.1), final=False)
    clock.now += 0.5
    progress.finish_pass(100)
    progress.predict(DowntimeParts(last_pass=7.0, start=0.5))
    info = progress.snapshot()
    assert info.expected_downtime_ms == 7.5
    assert info.passes[0].to_dict() == {
        "pages": 10_240,
        "zero_pages": 9240,
        "bytes": 4_090_000,
        "ms": 500.0,
        "dirty_pages_after": 100,
        "throttle_percent": 0,
        "predicted_downtime_ms": 7.5,
    }
    assert info.bytes_per_second == pytest.approx(40e6), "zero pages say nothing about the link"
    assert info.remaining == 100 * 4096
    assert info.dirty_pages_rate == pytest.approx(100 / 0.7)
    assert info.setup_time_ms == pytest.approx(200)
    progress.begin_pass(100)
    progress.sent(Sent(size=400_000, pages=100, zero_pages=0, seconds=0.1), final=True)
    progress.finish_pass(0)
    progress.advance(MigrationStatus.DEVICE)
    progress.enter(MigrationStatus.COMPLETED, downtime_ms=12.5)
    clock.now += 1000
    final = progress.snapshot()
    assert final.total_time_ms == pytest.approx(700), "the account is final"
    answer = final.to_qmp()
    assert answer["ram"]["normal"] == 1100
    assert answer["ram"]["duplicate"] == 9240
    assert answer["ram"]["precopy-bytes"] + answer["ram"]["downtime-bytes"] == answer["ram"]["transferred"]
    assert answer["total-time"] == 700
    assert answer["downtime"] == 12
    assert answer["x-sterna"]["predicted-downtime-ms"] == 7.5
    assert answer["x-sterna"]["predicted-downtime-parts"]["last-pass"] == 7.0
    assert answer["x-sterna"]["predicted-over-real"] == 0.6
    assert [data["pass"] for name, data in events if name == "MIGRATION_PASS"] == [1, 2]


def test_statuses_follow_each_other_as_drawn() -> None:
    progress = Progress(lambda name, data: None, "")
    with pytest.raises(IllegalTransition, match="from none to active"):
        progress.enter(MigrationStatus.ACTIVE)
    progress.enter(MigrationStatus.SETUP)
    progress.cancelling()
    progress.advance(MigrationStatus.ACTIVE)
    assert progress.snapshot().status is MigrationStatus.CANCELLING
    progress.enter(MigrationStatus.CANCELLED)
    progress.cancelling()
    assert progress.snapshot().status is MigrationStatus.CANCELLED


def test_nothing_happened_yet() -> None:
    assert MigrationInfo().to_qmp() == {}


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("tcp:[::1]:44", {"type": "inet", "host": "::1", "port": "44"}),
        ("unix:/run/x", {"type": "unix", "path": "/run/x"}),
    ],
)
def test_a_listener_shows_its_address(uri: str, address: dict[str, str]) -> None:
    info = MigrationInfo(status=MigrationStatus.SETUP, incoming=True, socket_address=uri)
    assert info.to_qmp()["socket-address"] == [address]
