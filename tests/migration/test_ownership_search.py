"""Exactly one guest: every order of events is looked at, and wrong rules are found."""

from dataclasses import replace

import pytest
from tests.migration.handover_model import Model, QemuModel, QemuSourceModel, Rules, search

from sterna import ownership
from sterna.ownership import AttemptEvent, AttemptOutcome, Event, Hold, OwnershipState

SOUND = Rules()


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize("one_host", [True, False])
def test_there_is_exactly_one_owner(one_host: bool, attempts: int) -> None:
    found = search(Model(one_host, attempts))
    assert not found.problem, "\n".join([found.problem, *found.timeline])
    assert found.states > (500 if attempts == 1 else 5000)


def test_a_qemu_and_its_source_never_both_run() -> None:
    found = search(QemuModel())
    assert not found.problem, "\n".join([found.problem, *found.timeline])
    assert found.states > 20


def test_a_qemu_as_source_and_its_destination_never_both_run() -> None:
    found = search(QemuSourceModel())
    assert not found.problem, "\n".join([found.problem, *found.timeline])
    assert found.states > 30


def holds(event: Event, before: OwnershipState, after: OwnershipState) -> Rules:
    """A wrong arrow for a machine's hold."""

    def next_hold(hold: Hold, happened: Event, migration: bytes = b"", *, watched: bool = False) -> Hold:
        if (hold.state, happened) == (before, event):
            return replace(hold, state=after)
        return ownership.next_hold(hold, happened, migration, watched=watched)

    return replace(SOUND, next_hold=next_hold)


def records(event: AttemptEvent, before: AttemptOutcome, after: AttemptOutcome) -> Rules:
    """A wrong arrow for a destination's record."""

    def next_outcome(outcome: AttemptOutcome, happened: AttemptEvent) -> AttemptOutcome:
        return after if (outcome, happened) == (before, event) else ownership.next_outcome(outcome, happened)

    return replace(SOUND, next_outcome=next_outcome)


def answers(before: AttemptOutcome, told: AttemptOutcome) -> Rules:
    return replace(SOUND, answer=lambda outcome: told if outcome is before else ownership.answer(outcome))


def unwatched(hold: Hold, event: Event, migration: bytes = b"", *, watched: bool = False) -> Hold:
    """A destination forgets that its source watches it."""
    if event is Event.TAKEN_OVER:
        watched = False
    return ownership.next_hold(hold, event, migration, watched=watched)


def any_migration(hold: Hold, event: Event, migration: bytes = b"", *, watched: bool = False) -> Hold:
    """What is said of one migration counts for another."""
    about = hold.migration if event in (Event.RUNS, Event.ABANDONED) else migration
    return ownership.next_hold(hold, event, about, watched=watched)


@pytest.mark.parametrize("one_host", [True, False])
def test_a_destination_that_ends_refuses_first(one_host: bool) -> None:
    """What was the order once: its monitor's clients first, the wait for a guest last."""
    found = search(Model(one_host, refuses=False))
    assert found.problem == "nobody has the guest"
    steps = [line[5:] for line in found.timeline]
    assert steps.index("the destination is told to end") < steps.index("destination reads COMMIT 1")
    assert steps.index("the destination starts the guest") < steps.index("the destination has ended")
    assert "source reads RUNNING 1" in steps
    assert steps[-1] in ("the destination has ended", "source reads RUNNING 1")


def test_a_destination_that_ends_says_that_it_abandons() -> None:
    """Where its process can be seen to end it need not; elsewhere nobody else says so."""
    assert not search(Model(True, says_so=False)).problem
    found = search(Model(False, says_so=False))
    assert found.problem == "nobody has the guest"
    steps = [line[5:] for line in found.timeline]
    assert {"the kernel takes COMMIT", "the destination has ended"} <= set(steps)
    assert steps[-1] == f"the source waits no longer: {Event.CONNECTION_LOST.value}"


WRONG = {
    # What was the rule once: a refused connection means that the process is gone.
    "a refusal is taken for death": holds(
        Event.CONNECTION_REFUSED, OwnershipState.IN_DOUBT, OwnershipState.OWNER
    ),
    "a stranger at the address is taken for death": holds(
        Event.UNKNOWN, OwnershipState.IN_DOUBT, OwnershipState.OWNER
    ),
    "a lost connection gives the guest back": holds(
        Event.CONNECTION_LOST, OwnershipState.IN_DOUBT, OwnershipState.OWNER
    ),
    "a deadline gives the guest back": holds(Event.DEADLINE, OwnershipState.IN_DOUBT, OwnershipState.OWNER),
    "a user's cancel gives the guest back": holds(
        Event.CANCELLED, OwnershipState.IN_DOUBT, OwnershipState.OWNER
    ),
    "cont in doubt": holds(Event.CONT, OwnershipState.IN_DOUBT, OwnershipState.OWNER),
    "cont of a guest that is away": holds(Event.CONT, OwnershipState.AWAY, OwnershipState.OWNER),
    "the source stays the owner after COMMIT": holds(
        Event.COMMIT_SENT, OwnershipState.OWNER, OwnershipState.OWNER
    ),
    "a question leaves the attempt pending": replace(
        records(AttemptEvent.ASKED, AttemptOutcome.PENDING, AttemptOutcome.PENDING),
        answer=lambda o: AttemptOutcome.ABANDONED if o is AttemptOutcome.PENDING else ownership.answer(o),
    ),
    "a question does not wait for the start": answers(AttemptOutcome.COMMITTED, AttemptOutcome.ABANDONED),
    "a lost connection abandons what is committed": records(
        AttemptEvent.GIVEN_UP, AttemptOutcome.COMMITTED, AttemptOutcome.ABANDONED
    ),
    "COMMIT revives what was abandoned": records(
        AttemptEvent.COMMIT, AttemptOutcome.ABANDONED, AttemptOutcome.COMMITTED
    ),
    "a watched destination passes the guest on": replace(SOUND, next_hold=unwatched),
    "one migration's end counts for another": replace(SOUND, next_hold=any_migration),
    "a failed start is not given back": holds(Event.GIVEN_BACK, OwnershipState.OWNER, OwnershipState.OWNER),
    "an answer that it was abandoned is not believed": holds(
        Event.ABANDONED, OwnershipState.IN_DOUBT, OwnershipState.IN_DOUBT
    ),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_rule_is_found(name: str) -> None:
    found = search(Model(True, 1, WRONG[name]))
    if not found.problem:
        found = search(Model(True, 2, WRONG[name]))
    print(found.problem, *found.timeline, sep="\n")
    assert found.problem in (
        "the guest runs at source and destination",
        "the guest runs at source and third machine",
        "nobody has the guest",
        "it never ends",
    )
    assert found.timeline


def test_the_counterexample_of_the_old_rule_is_a_time_line() -> None:
    found = search(Model(False, 1, WRONG["a refusal is taken for death"]))
    assert found.problem == "the guest runs at source and destination"
    steps = [line[5:] for line in found.timeline]
    assert steps.index("the kernel takes COMMIT") < steps.index(
        f"the source asks: {Event.CONNECTION_REFUSED.value}"
    )
    assert "destination reads COMMIT 1" in steps


@pytest.mark.parametrize(
    ("event", "before"),
    [
        (Event.SHUT_WITH_ERROR, OwnershipState.IN_DOUBT),
        (Event.CONNECTION_LOST, OwnershipState.IN_DOUBT),
        (Event.DEADLINE, OwnershipState.IN_DOUBT),
        (Event.CANCELLED, OwnershipState.IN_DOUBT),
        (Event.COMMIT_SENT, OwnershipState.OWNER),
        (Event.CONT, OwnershipState.IN_DOUBT),
    ],
)
def test_a_wrong_rule_with_a_qemu_is_found(event: Event, before: OwnershipState) -> None:
    found = search(QemuModel(holds(event, before, OwnershipState.OWNER)))
    assert found.problem == "the guest runs at source and QEMU"


@pytest.mark.parametrize(
    "model",
    [
        # What was the order once: the guest was started, and its source told.
        QemuSourceModel(starts_last=False),
        QemuSourceModel(holds(Event.SHUT_SENT, OwnershipState.ABSENT, OwnershipState.OWNER)),
        QemuSourceModel(holds(Event.SHUT_CUT, OwnershipState.ARRIVED, OwnershipState.OWNER)),
        QemuSourceModel(holds(Event.CONT, OwnershipState.ARRIVED, OwnershipState.OWNER)),
        # Nothing can be done about it here: QEMU has no word for having read SHUT.
        QemuSourceModel(late_cancel=True),
    ],
    ids=[
        "starts first",
        "owns what it has sent word of",
        "owns what it could not say",
        "cont",
        "late cancel",
    ],
)
def test_a_wrong_rule_with_a_qemu_as_source_is_found(model: QemuSourceModel) -> None:
    found = search(model)
    print(found.problem, *found.timeline, sep="\n")
    assert found.problem == "the guest runs at QEMU and destination"
    assert found.timeline
