"""Auto-converge: when it slows the guest, by how much, and that it stops doing so. And policies, live."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.migration.pairs import TCP, Host, hosts
from tests.refusal import refuse_threads

import sterna
from sterna.machine.throttle import Throttle
from sterna.migration.controller import MigrationController
from sterna.migration.parameters import Parameters
from sterna.migration.policies.fixed import AutoConverge
from sterna.migration.policy import ConvergenceState, PassProgress
from sterna.migration.statistics import MigrationStatus
from sterna.testing.guest import DoubleGuest


def converge(**changes):
    parameters = Parameters()
    parameters.set_capabilities({"auto-converge": True})
    parameters.set({name.replace("_", "-"): value for name, value in changes.items()})
    return AutoConverge(parameters)


def test_off_means_off():
    rule = AutoConverge(Parameters())
    assert [rule.after_pass(100, 1000) for _ in range(6)] == [0] * 6


def test_every_second_bad_pass_raises_it():
    rule = converge()
    assert [rule.after_pass(100, 90) for _ in range(8)] == [0, 20, 20, 30, 30, 40, 40, 50]


def test_good_passes_do_not_count():
    rule = converge()
    assert [rule.after_pass(100, dirtied) for dirtied in (90, 50, 50, 51, 10, 90, 90)] == [
        0,
        0,
        0,
        20,
        20,
        20,
        30,
    ]


def test_limits():
    rule = converge(cpu_throttle_initial=80, cpu_throttle_increment=30, max_cpu_throttle=95)
    assert [rule.after_pass(100, 200) for _ in range(6)] == [0, 80, 80, 95, 95, 95]


def test_threshold():
    rule = converge(throttle_trigger_threshold=10)
    rule.after_pass(100, 11)
    assert rule.after_pass(100, 11) == 20


def test_tailslow_stops_where_the_threshold_would_be_met():
    rule = converge(cpu_throttle_tailslow=True, cpu_throttle_initial=50, cpu_throttle_increment=40)
    rule.after_pass(100, 100)
    assert rule.after_pass(100, 100) == 50
    rule.after_pass(100, 60)
    # At 50 % it dirties 60; 50 * 50 / 60 is 42 % of running time: 8 % more throttle.
    assert rule.after_pass(100, 60) == 58


def greedy_guest() -> DoubleGuest:
    """A guest that has written all of its memory, and does so again in each pass, as far as it is not throttled."""
    guest = DoubleGuest(2000, steps_per_ms=0, steps_per_harvest=2000)
    guest.advance_steps(2000)
    return guest


@pytest.mark.parametrize("enabled", [True, False])
def test_guest_is_slowed_until_it_fits_and_freed_afterwards(enabled):
    with (
        greedy_guest() as guest,
        DoubleGuest(2000, running=False) as target,
        MigrationController(guest, lambda *_: None) as source,
        MigrationController(target, lambda *_: None) as destination,
    ):
        source.set_capabilities({"auto-converge": enabled})
        source.set_parameters({"x-sterna-policy": "fixed", "max-bandwidth": 40_000_000, "downtime-limit": 10})
        source.migrate(destination.incoming("tcp:127.0.0.1:0"))
        if enabled:
            info = source.wait(300)
            assert info.status is MigrationStatus.COMPLETED
            assert info.throttle_percent >= 20
            assert guest.throttled == [*sorted(guest.throttled[:-1]), 0]
        else:
            # As many passes as have raised the throttle twice where it may be.
            while len((info := source.wait(0.01)).passes) < 5:
                assert info.status.running, info.error
            source.cancel()
            source.wait(300)
            assert guest.throttled == []


def test_a_cancelled_migration_frees_the_guest():
    with (
        greedy_guest() as guest,
        DoubleGuest(2000, running=False) as target,
        MigrationController(guest, lambda *_: None) as source,
        MigrationController(target, lambda *_: None) as destination,
    ):
        source.set_capabilities({"auto-converge": True})
        source.set_parameters({"x-sterna-policy": "fixed", "max-bandwidth": 40_000_000, "downtime-limit": 0})
        source.migrate(destination.incoming("tcp:127.0.0.1:0"))
        while not guest.throttled:
            assert source.wait(0.01).status.running
        source.cancel()
        assert source.wait(300).status is MigrationStatus.CANCELLED
        assert guest.throttled[-1] == 0
        assert guest.running


class ThrottledGuest(DoubleGuest):
    """A greedy guest with a machine's own throttle."""

    def __init__(self):
        self.was_held = threading.Event()
        self._throttle = Throttle(self)
        super().__init__(2000, steps_per_ms=0, steps_per_harvest=2000)
        self.advance_steps(2000)

    def throttle(self, percent):
        super().throttle(percent)
        self._throttle.set(percent)

    def hold(self):
        self.was_held.set()

    def release(self):
        pass


FAST = {"x-sterna-policy": "fixed", "max-bandwidth": 40_000_000, "downtime-limit": 0}


def test_a_throttle_that_cannot_begin_leaves_no_log_on(monkeypatch):
    refuse_threads(monkeypatch, "throttle", times=1)
    with hosts(ThrottledGuest(), DoubleGuest(2000, running=False)) as (here, there):
        here.controller.set_capabilities({"auto-converge": True})
        here.controller.set_parameters(FAST)
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is MigrationStatus.FAILED
        assert info.error.endswith("can't start new thread")
        assert here.guest.running
        assert not here.guest.logging
        here.guest.throttle(20)
        assert here.guest.was_held.wait(30)
        here.guest.throttle(0)


def test_a_throttle_that_cannot_end_leaves_no_log_on(monkeypatch):
    def fail(percent):
        raise RuntimeError(f"the brake is stuck at {percent} %")

    with hosts(greedy_guest(), DoubleGuest(2000, running=False)) as (here, there):
        monkeypatch.setattr(here.guest, "throttle", fail)
        here.controller.set_capabilities({"auto-converge": True})
        here.controller.set_parameters(FAST)
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is MigrationStatus.FAILED
        assert (
            "stuck at 20 %; and its throttle and dirty log cannot be ended: the brake is stuck at 0 %"
            in info.error
        )
        assert here.guest.running
        assert not here.guest.logging


@contextmanager
def fast_guest(**parameters: object) -> Iterator[tuple[DoubleGuest, Host, str]]:
    """A greedy guest, and where it is to go."""
    with hosts(greedy_guest(), DoubleGuest(2000, running=False)) as (here, there):
        here.controller.set_parameters({"max-bandwidth": 40_000_000, "downtime-limit": 20, **parameters})
        here.controller.set_capabilities({"xbzrle": False})
        yield here.guest, here, there.controller.incoming(TCP)


def test_adaptive_throttles_a_guest_that_cannot_be_followed_otherwise() -> None:
    with fast_guest() as (guest, here, uri):
        info = here.migrate(uri)
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert info.verified
        assert info.policy == "adaptive"
        assert info.throttle_percent > 0
        assert guest.throttled[-1] == 0
        assert [record.throttle_percent for record in info.passes] == sorted(
            record.throttle_percent for record in info.passes
        )
        assert info.passes[0].throttle_percent == 0
        assert info.predicted_downtime is not None
        assert info.passes[-2].predicted_downtime_ms == pytest.approx(info.predicted_downtime.total)


@pytest.mark.parametrize("forbidden", ["capability", "parameter"])
def test_adaptive_leaves_a_guest_alone_that_must_not_be_slowed(forbidden: str) -> None:
    with fast_guest() as (guest, here, uri):
        if forbidden == "capability":
            here.controller.set_capabilities({"auto-converge": False})
        else:
            here.controller.set_parameters({"x-sterna-max-throttle": 0})
        here.controller.migrate(uri)
        # A guest that gets little of a busy processor may be followed for some passes.
        info = here.wait_info(lambda info: info.verdict != "")
        assert "what would do: a downtime limit of" in info.verdict
        assert info.to_qmp()["x-sterna"]["verdict"] == info.verdict
        assert not guest.throttled
        here.controller.set_parameters({"max-bandwidth": 0, "downtime-limit": 1000})
        info = here.outcome()
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert info.verdict == ""


def test_a_deadline_that_cannot_be_kept_leaves_the_guest_here() -> None:
    parameters = {"x-sterna-policy": "deadline", "x-sterna-deadline": 1, "max-bandwidth": 4_000_000}
    with fast_guest(**parameters) as (guest, here, uri):
        info = here.migrate(uri)
        assert info.status is MigrationStatus.FAILED
        assert "the deadline of 1 s cannot be kept: pass 1 has" in info.error
        assert guest.running
        assert not guest.logging


def test_a_deadline_is_kept_by_slowing_the_guest() -> None:
    with fast_guest(**{"x-sterna-policy": "deadline", "x-sterna-deadline": 20}) as (guest, here, uri):
        info = here.migrate(uri)
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert max(guest.throttled) > 0
        assert guest.throttled[-1] == 0


def test_fixed_stops_by_the_bandwidth_alone() -> None:
    with fast_guest(**{"x-sterna-policy": "fixed"}) as (guest, here, uri):
        here.controller.migrate(uri)
        here.wait_pass(4)
        assert not guest.throttled
        # 8 MB of guest fit a second at 40 MB/s.
        here.controller.set_parameters({"downtime-limit": 1000})
        info = here.outcome()
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert info.policy == "fixed"


def test_a_policy_of_ones_own_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        def after_pass(self, state: ConvergenceState) -> sterna.Continue | sterna.GiveUp:
            return sterna.GiveUp("three are enough") if state.last.number == 3 else sterna.Continue()

        def during_pass(self, progress: PassProgress) -> None:
            return None

    monkeypatch.setitem(sterna.POLICIES._items, "own", sterna.PolicyType("own", lambda parameters: Own()))
    with fast_guest(**{"x-sterna-policy": "own"}) as (guest, here, uri):
        info = here.migrate(uri)
        assert (info.status, info.policy) == (MigrationStatus.FAILED, "own")
        assert info.error == "three are enough"
        assert len(info.passes) == 3
        assert guest.running
