"""Passes that are over at once: they do not spin."""

import time

import pytest
from tests.migration.double import DoubleGuest
from tests.migration.pairs import TCP, hosts, waiting_guest

from sterna.migration.convergence import backoff as backoff_module
from sterna.migration.convergence.backoff import Backoff
from sterna.migration.statistics import MigrationInfo, MigrationStatus


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
    with hosts(DoubleGuest(64, steps_per_ms=0, steps_per_look=1), waiting_guest()) as (here, there):
        here.controller.set_parameters({"downtime-limit": 0, "x-sterna-max-throttle": 0})
        here.controller.migrate(there.controller.incoming(TCP))
        # The prediction is the last that is told before the wait; until then a cancel would be seen elsewhere.
        while not is_predicted(info := here.controller.wait(0.01)):
            assert info.status.running
        here.controller.cancel()
        assert here.outcome().status is MigrationStatus.CANCELLED
        assert here.guest.running


def test_a_guest_that_always_writes_a_little_does_not_cost_a_processor() -> None:
    with hosts(DoubleGuest(64, steps_per_ms=0, steps_per_look=1), waiting_guest()) as (here, there):
        here.controller.set_parameters({"downtime-limit": 0, "x-sterna-max-throttle": 0})
        started = time.monotonic()
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(20)
        seconds = time.monotonic() - started
        passes = here.controller.info().passes[:19]
        backoff = Backoff()
        waits = [backoff.after_pass(record.ms / 1000) for record in passes]
        assert seconds >= sum(waits) + sum(record.ms for record in passes) / 1000
        # What is written during a wait is found by a look of its own, sent by the pass behind it, and not found again at its end.
        assert [record.pages for record in passes[1:]] == [2 if wait else 1 for wait in waits[:-1]]
        assert {record.dirty_pages_after for record in passes} == {1}
        here.controller.cancel()
        assert here.outcome().status is MigrationStatus.CANCELLED
        assert here.guest.running
