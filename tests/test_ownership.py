"""What a machine must not do, and what tells it nothing."""

import pytest

from sterna.ownership import (
    AttemptOutcome,
    Event,
    Hold,
    IllegalEvent,
    NotTheOwner,
    Ownership,
    OwnershipState,
    answer,
    may_migrate,
    next_hold,
)

ONE, OTHER = bytes([1]) * 16, bytes([2]) * 16
TELLS_NOTHING = (
    Event.CONNECTION_LOST,
    Event.CONNECTION_REFUSED,
    Event.NO_ANSWER,
    Event.UNKNOWN,
    Event.DEADLINE,
    Event.CANCELLED,
    Event.SHUT_WITH_ERROR,
)


@pytest.mark.parametrize("standing", OwnershipState)
@pytest.mark.parametrize("event", TELLS_NOTHING)
def test_some_events_change_nothing(event: Event, standing: OwnershipState) -> None:
    hold = Hold(standing, ONE)
    assert next_hold(hold, event, ONE) == hold


@pytest.mark.parametrize(
    "event", [Event.RUNS, Event.ABANDONED, Event.PROCESS_ENDED, Event.COMMIT_CUT, Event.HANDED_ON]
)
@pytest.mark.parametrize("migration", [OTHER, b""])
def test_what_is_said_of_another_migration_counts_for_nothing(event: Event, migration: bytes) -> None:
    hold = Hold(OwnershipState.IN_DOUBT, ONE)
    assert next_hold(hold, event, migration) == hold
    assert next_hold(hold, event, ONE) != hold


@pytest.mark.parametrize(
    ("hold", "event"),
    [
        (Hold(OwnershipState.OWNER), Event.TAKEN_OVER),
        (Hold(OwnershipState.IN_DOUBT, ONE), Event.TAKEN_OVER),
        (Hold(OwnershipState.ABSENT), Event.COMMIT_SENT),
        (Hold(OwnershipState.IN_DOUBT, ONE), Event.COMMIT_SENT),
        (Hold(OwnershipState.AWAY, ONE), Event.COMMIT_SENT),
        (Hold(OwnershipState.OWNER, ONE, watched=True), Event.COMMIT_SENT),
        (Hold(OwnershipState.OWNER, ONE, watched=True), Event.SAVED),
        (Hold(OwnershipState.IN_DOUBT, ONE), Event.SAVED),
    ],
)
def test_what_a_machine_must_not_do(hold: Hold, event: Event) -> None:
    with pytest.raises(IllegalEvent, match=event.name):
        next_hold(hold, event, OTHER)


def test_what_a_machine_does_it_does_for_a_migration() -> None:
    with pytest.raises(IllegalEvent):
        next_hold(Hold(OwnershipState.OWNER), Event.COMMIT_SENT)


@pytest.mark.parametrize("event", [Event.CONFIRMED, Event.SOURCE_ENDED])
def test_a_guest_that_came_moves_on_once_its_source_asks_no_more(event: Event) -> None:
    hold = next_hold(Hold(OwnershipState.ABSENT), Event.TAKEN_OVER, ONE, watched=True)
    assert not may_migrate(hold)
    assert not may_migrate(next_hold(hold, event, OTHER))
    assert may_migrate(next_hold(hold, event, ONE))


@pytest.mark.parametrize(
    ("standing", "told"),
    [
        (OwnershipState.ABSENT, "no guest has come here"),
        (OwnershipState.IN_DOUBT, "may run at the migration's destination"),
        (OwnershipState.AWAY, "runs at the destination"),
        (OwnershipState.SAVED, "was saved"),
        (OwnershipState.HANDED_ON, "was handed to a command or descriptor, and may run where that led"),
    ],
)
def test_only_the_owner_runs(standing: OwnershipState, told: str) -> None:
    ownership = Ownership(standing)
    assert not ownership.may_run
    with pytest.raises(NotTheOwner, match=told):
        ownership.require_owner()
    Ownership(OwnershipState.OWNER).require_owner()


def test_a_question_during_the_start_has_no_answer_yet() -> None:
    assert answer(AttemptOutcome.COMMITTED) is None
    assert answer(AttemptOutcome.PENDING) is AttemptOutcome.PENDING
