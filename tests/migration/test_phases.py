"""Phases: what they leave behind when one fails, and one that is added beside the others."""

from contextlib import ExitStack
from functools import partial

import pytest
from tests.migration.pairs import TCP, hosts, waiting_guest

from sterna.migration.errors import GivenUp
from sterna.migration.phase import Phase, run_phases
from sterna.migration.source import precopy
from sterna.migration.source.context import Link, SourceContext
from sterna.migration.source.handover import HandOver
from sterna.migration.source.switchover import SwitchOver
from sterna.migration.statistics import MigrationStatus, Timeline
from sterna.ownership import OwnershipState
from sterna.testing import DoubleGuest

PAGES = 8


def test_what_a_phase_opens_is_closed_after_the_last_the_latest_first() -> None:
    told: list[str] = []

    class Last(Phase):
        def run(self, stack: ExitStack) -> None:
            told.append("last")
            stack.callback(told.append, "closed by the last")

    class First(Phase):
        def run(self, stack: ExitStack) -> Last:
            stack.callback(told.append, "closed by the first")
            return Last()

    begun: list[Phase] = []
    run_phases(First(), begun)
    assert told == ["last", "closed by the last", "closed by the first"]
    assert [type(phase) for phase in begun] == [First, Last]


@pytest.mark.parametrize("call", ["stop_for_migration", "save_devices"])
def test_a_guest_runs_again_when_its_log_is_off(call: str) -> None:
    guest = DoubleGuest(PAGES, steps_per_ms=0)
    resume = guest.resume
    logged: list[bool] = []

    def noted() -> int:
        logged.append(guest.logging)
        return resume()

    guest.resume = noted  # type: ignore[method-assign]
    guest.fail[call] = GivenUp("enough")
    with hosts(guest, waiting_guest(PAGES)) as (here, there):
        info = here.migrate(there.controller.incoming(TCP))
        assert (info.status, info.error) == (MigrationStatus.FAILED, "enough")
        assert logged == [False]
        assert guest.running
        assert not there.guest.running


def test_a_phase_that_follows_the_switchover_goes_before_the_handover(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that sends pages on demand would: nothing but precopy knows of it."""
    told: list[str] = []

    class Between(Phase):
        def __init__(self, context: SourceContext, link: Link, end: bytes, timeline: Timeline) -> None:
            self.last = HandOver(context, link, end, timeline)
            self.guest = context.guest

        def run(self, stack: ExitStack) -> Phase:
            assert isinstance(self.guest, DoubleGuest)
            told.append("running" if self.guest.running else "stopped")
            if self.guest.steps == 0:
                raise GivenUp("nothing was done")
            return self.last

        def undo(self, standing: OwnershipState) -> None:
            told.append(f"undone: {standing.value}")
            raise GivenUp("that failed too")

        fault = "its work cannot be undone"

    monkeypatch.setattr(precopy, "SwitchOver", partial(SwitchOver, then=Between))
    idle, busy = DoubleGuest(PAGES, steps_per_ms=0), DoubleGuest(PAGES, steps_per_ms=0)
    busy.advance_steps(1)
    with hosts(idle, busy, waiting_guest(PAGES)) as (here, other, there):
        address = there.controller.incoming(TCP)
        info = here.migrate(address)
        assert info.status is MigrationStatus.FAILED
        assert info.error == "nothing was done; and its work cannot be undone: that failed too"
        assert told == ["stopped", "undone: owner"]
        assert idle.running
        assert not idle.logging
        assert other.migrate(address).status is MigrationStatus.COMPLETED
        assert told[2:] == ["stopped"]
        assert there.guest.running
        there.guest.check_ram()
