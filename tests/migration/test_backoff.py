"""Passes that are over at once: they do not spin."""

import time

import pytest
from tests.migration.pairs import TCP, assert_one_runs, hosts, waiting_guest

from sterna.migration import backoff as backoff_module
from sterna.migration.backoff import Backoff
from sterna.migration.source.precopy import Precopy
from sterna.migration.statistics import MigrationInfo, MigrationStatus
from sterna.migration.transport.work import PassWork
from sterna.testing.guest import DoubleGuest


def test_the_waits_grow_and_a_long_pass_ends_them() -> None:
    backoff = Backoff()
    assert [backoff.after_pass(0.002) for _ in range(18)] == [
        *[0.0] * 8,
        *[0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.1, 0.1, 0.1],
    ]
    assert [backoff.after_pass(seconds) for seconds in (0.05, 0.002)] == [0.0, 0.0]
    assert not any(Backoff().after_pass(1.0) for _ in range(100))
    for _ in range(5000):
        assert backoff.after_pass(0.0) <= 0.1


def is_predicted(info: MigrationInfo) -> bool:
    """Whether the first pass is over and what a stop would cost is known."""
    return bool(info.passes) and info.passes[0].predicted_downtime_ms is not None


def test_a_cancel_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long one, after the first pass, however long that took."""
    monkeypatch.setattr(backoff_module, "_AT_ONCE", 0)
    for name in ("_SHORT_SECONDS", "_FIRST_SECONDS", "_LONGEST_SECONDS"):
        monkeypatch.setattr(backoff_module, name, 1000.0)
    with hosts(DoubleGuest(64, steps_per_ms=0, steps_per_harvest=1), waiting_guest()) as (here, there):
        here.controller.set_parameters({"downtime-limit": 0, "x-sterna-max-throttle": 0})
        here.controller.migrate(there.controller.incoming(TCP))
        # The prediction is the last that is told before the wait; until then a cancel would be seen elsewhere.
        while not is_predicted(info := here.controller.wait(0.01)):
            assert info.status.running
        here.controller.cancel()
        assert here.outcome().status is MigrationStatus.CANCELLED
        assert here.guest.running


def test_a_guest_that_always_writes_a_little_does_not_cost_a_processor() -> None:
    with hosts(DoubleGuest(64, steps_per_ms=0, steps_per_harvest=1), waiting_guest()) as (here, there):
        here.controller.set_parameters({"downtime-limit": 0, "x-sterna-max-throttle": 0})
        started = time.monotonic()
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(20)
        seconds = time.monotonic() - started
        passes = here.controller.info().passes[:19]
        backoff = Backoff()
        waits = [backoff.after_pass(record.seconds) for record in passes]
        assert seconds >= sum(waits) + sum(record.seconds for record in passes)
        # What is written during a wait is found by a look of its own, sent by the pass behind it, and not found again at its end.
        # A pass of a few pages has two looks: one before the destination is waited for, one after.
        assert [record.pages for record in passes[1:]] == [3 if wait else 2 for wait in waits[:-1]]
        assert {record.dirty_pages for record in passes} == {2}
        here.controller.cancel()
        assert here.outcome().status is MigrationStatus.CANCELLED
        assert here.guest.running


@pytest.mark.parametrize("policy", ["adaptive", "fixed"])
def test_what_is_written_while_the_destination_is_waited_for_is_not_left(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest whose timer ticks while the destination answers has something in every later look."""
    guest = DoubleGuest(100, steps_per_ms=0)
    original = Precopy._await_destination

    def ticks(self: Precopy, work: PassWork) -> None:
        guest.advance_steps(1)
        original(self, work)

    monkeypatch.setattr(Precopy, "_await_destination", ticks)
    with hosts(guest, waiting_guest(100)) as (here, there):
        here.controller.set_parameters({"downtime-limit": 0, "x-sterna-policy": policy})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert len(info.passes) < 10
        assert_one_runs(guest, there.guest)


def test_much_is_left_whenever_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst while the destination is waited for gets a pass of its own: the guest does not stand still for it."""
    guest = DoubleGuest(2000, steps_per_ms=0)
    original = Precopy._await_destination
    written = [1, 1000]

    def burst(self: Precopy, work: PassWork) -> None:
        guest.advance_steps(written.pop(0) if written else 0)
        original(self, work)

    monkeypatch.setattr(Precopy, "_await_destination", burst)
    with hosts(guest, waiting_guest(2000)) as (here, there):
        here.controller.set_parameters({"downtime-limit": 0, "x-sterna-policy": "fixed"})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert [record.pages for record in info.passes[:3]] == [2000, 1, 1000]
        assert info.passes[-1].pages == 0
