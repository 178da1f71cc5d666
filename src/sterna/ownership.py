"""Who may run a guest: the transition functions of both ends of a migration. Nothing here reads, writes or waits.

Both ends change what they hold through these functions and start a vCPU only where `may_run` says so. The search in
`tests/migration/test_ownership_search.py` drives the same functions through every order of messages, losses, stops and kills.

A machine *holds* a guest::

    absent --TAKEN_OVER--> owner --COMMIT_SENT--> in doubt --RUNS--> away
       ^                    | ^  ^                   |  |
       +----GIVEN_BACK------+ |  +-- COMMIT_CUT, ----+  +--HANDED_ON--> handed on
                         CONT |      ABANDONED,
                              |      PROCESS_ENDED
                            saved <--SAVED-- owner

    in doubt, away, handed on, saved --FORCED_CONT--> owner    (a user's word, against the claim that a guest never runs twice)

    absent --SHUT_SENT--> arrived --TAKEN_OVER, FORCED_CONT--> owner         (a guest from a QEMU)
       ^                     |
       +-----SHUT_CUT--------+

and the destination of a migration records its *outcome*::

    unknown --OFFER--> pending --COMMIT--> committed --STARTED--> running
                          |                    |
                     GIVEN_UP, ASKED      START_FAILED
                          +--------------------+--> abandoned

The source is in doubt from COMMIT on (to a sterna), or from the first byte of the stream's end on (to everyone else). What ends a
doubt is the destination's own word about this migration, or the proof that its process has ended. A connection that is lost or
refused, silence, a deadline, a user's cancel and a destination that does not know the migration end none: they are events like
the others, and change nothing.

A QEMU that migrates a guest here gives it up when it reads SHUT(0) on its return path, and goes on with it on any other end of
that. So the destination says so first, and takes the guest over when that has left its host's hands; else it waits for its user.

A process that ends takes its guest along, but not a guest that it has passed on. So a destination whose source watches its
process does not migrate the guest on before the source has confirmed that it knows, or has ended itself.
"""

import threading
from dataclasses import dataclass, replace
from enum import Enum, IntEnum

from sterna.errors import Error, InternalError


class OwnershipState(Enum):
    """What a machine has to do with its guest."""

    ABSENT = "absent"
    """No guest has come here yet."""
    ARRIVED = "arrived"
    """All of the guest is here, and its source, a QEMU, gives it up or goes on with it; which of them is not known yet."""
    OWNER = "owner"
    """The guest is here, and nowhere else."""
    IN_DOUBT = "in doubt"
    """Another may have started it; nobody has said so."""
    AWAY = "away"
    """Another has said that it runs the guest."""
    SAVED = "saved"
    """The guest stopped here when a file was complete; it may go on."""
    HANDED_ON = "handed on"
    """A command or whoever reads a descriptor has all of the guest; nobody says what became of it."""


class Event(Enum):
    """What happens to a machine that holds a guest, or waits for one."""

    TAKEN_OVER = "the guest was taken over from a source"
    GIVEN_BACK = "the guest that was taken over could not be started"
    SHUT_SENT = "what has the source, a QEMU, give the guest up is handed to the kernel"
    SHUT_CUT = "the kernel took too little of that"
    COMMIT_SENT = "what lets the destination start is handed to the kernel"
    COMMIT_CUT = "the kernel took too little of that for the destination to start"
    RUNS = "the destination says that it runs the guest"
    ABANDONED = "the destination says that it will never start this migration's guest"
    PROCESS_ENDED = "the destination's process has ended"
    SAVED = "the file with the guest is complete"
    HANDED_ON = "the command, or the descriptor's reader, has all of the stream"
    CONFIRMED = "the source says that it knows that the guest runs here"
    SOURCE_ENDED = "the source's process has ended"
    CONT = "the user wants the guest to run"
    FORCED_CONT = "the user wants the guest to run, and answers for it that it runs nowhere else"
    # What tells nothing about who runs the guest:
    CONNECTION_LOST = "the connection to the destination broke"
    CONNECTION_REFUSED = "nobody listens at the destination's address"
    NO_ANSWER = "the destination does not answer"
    UNKNOWN = "whoever listens at the destination's address does not know the migration"
    DEADLINE = "a time limit has passed"
    CANCELLED = "the wait for the destination's word was cancelled"
    SHUT_WITH_ERROR = (
        "a QEMU closes the return path with an error, which it does before and after the guest's start"
    )


class AttemptOutcome(IntEnum):
    """What a destination did with a migration. UNKNOWN is no record: this process never saw it, or long ago."""

    UNKNOWN = 0
    PENDING = 1
    COMMITTED = 2
    RUNNING = 3
    ABANDONED = 4


class AttemptEvent(Enum):
    """What happens to one attempt at the destination."""

    OFFER = "the source names the migration"
    COMMIT = "the guest is the destination's"
    STARTED = "the guest was started"
    START_FAILED = "the guest could not be started, and stands still"
    GIVEN_UP = "connection lost, error, cancelled, deadline"
    ASKED = "the source asks who runs the guest"


class IllegalEvent(InternalError):
    """A machine was to do what its state forbids."""


@dataclass(frozen=True)
class Hold:
    """A machine's hold on its guest.

    :ivar migration: id of the migration that is in doubt, or that brought the guest here
    :ivar watched: the source of that migration takes the end of this process for the end of the guest, and has not confirmed
    """

    state: OwnershipState
    migration: bytes = b""
    watched: bool = False


_NEXT: dict[tuple[OwnershipState, Event], OwnershipState] = {
    (OwnershipState.ABSENT, Event.TAKEN_OVER): OwnershipState.OWNER,
    (OwnershipState.ABSENT, Event.SHUT_SENT): OwnershipState.ARRIVED,
    (OwnershipState.ARRIVED, Event.SHUT_CUT): OwnershipState.ABSENT,
    (OwnershipState.ARRIVED, Event.TAKEN_OVER): OwnershipState.OWNER,
    (OwnershipState.ARRIVED, Event.FORCED_CONT): OwnershipState.OWNER,
    (OwnershipState.OWNER, Event.GIVEN_BACK): OwnershipState.ABSENT,
    (OwnershipState.OWNER, Event.COMMIT_SENT): OwnershipState.IN_DOUBT,
    (OwnershipState.OWNER, Event.SAVED): OwnershipState.SAVED,
    (OwnershipState.IN_DOUBT, Event.COMMIT_CUT): OwnershipState.OWNER,
    (OwnershipState.IN_DOUBT, Event.RUNS): OwnershipState.AWAY,
    (OwnershipState.IN_DOUBT, Event.ABANDONED): OwnershipState.OWNER,
    (OwnershipState.IN_DOUBT, Event.PROCESS_ENDED): OwnershipState.OWNER,
    (OwnershipState.IN_DOUBT, Event.HANDED_ON): OwnershipState.HANDED_ON,
    (OwnershipState.IN_DOUBT, Event.FORCED_CONT): OwnershipState.OWNER,
    (OwnershipState.AWAY, Event.FORCED_CONT): OwnershipState.OWNER,
    (OwnershipState.HANDED_ON, Event.FORCED_CONT): OwnershipState.OWNER,
    (OwnershipState.SAVED, Event.CONT): OwnershipState.OWNER,
    (OwnershipState.SAVED, Event.FORCED_CONT): OwnershipState.OWNER,
}

_BEGINS = frozenset({Event.TAKEN_OVER, Event.SHUT_SENT, Event.COMMIT_SENT, Event.SAVED})
"""What a machine does itself, with the id of the migration that it does it for: there has to be an arrow. Every other
event counts only for the migration that the hold is about."""

_FROM_THE_USER = frozenset({Event.CONT, Event.FORCED_CONT})


def next_hold(hold: Hold, event: Event, migration: bytes = b"", *, watched: bool = False) -> Hold:
    """What a machine holds after an event. What others do changes nothing where the drawing has no arrow for it.

    :param migration: id of the migration that the event is about
    :param watched: with TAKEN_OVER: the source watches this process
    :raise IllegalEvent: When the machine does what it must not do: a mistake of the caller.
    """
    state = _NEXT.get((hold.state, event))
    if event in _BEGINS:
        if state is None or not migration or hold.watched:
            raise IllegalEvent(f"{event.name} of a machine that is {hold}")
        return Hold(state, migration, watched)
    if event not in _FROM_THE_USER and (not migration or hold.migration != migration):
        return hold
    if event in (Event.CONFIRMED, Event.SOURCE_ENDED):
        return replace(hold, watched=False)
    if state is None:
        return hold
    return Hold(state) if state is OwnershipState.ABSENT else replace(hold, state=state)


def may_run(hold: Hold) -> bool:
    """Whether vCPUs may run guest code here."""
    return hold.state is OwnershipState.OWNER


def may_migrate(hold: Hold) -> bool:
    """Whether the guest may be offered to another machine, or saved."""
    return hold.state is OwnershipState.OWNER and not hold.watched


_ATTEMPT: dict[tuple[AttemptOutcome, AttemptEvent], AttemptOutcome] = {
    (AttemptOutcome.UNKNOWN, AttemptEvent.OFFER): AttemptOutcome.PENDING,
    (AttemptOutcome.PENDING, AttemptEvent.COMMIT): AttemptOutcome.COMMITTED,
    (AttemptOutcome.PENDING, AttemptEvent.GIVEN_UP): AttemptOutcome.ABANDONED,
    (AttemptOutcome.PENDING, AttemptEvent.ASKED): AttemptOutcome.ABANDONED,
    (AttemptOutcome.COMMITTED, AttemptEvent.STARTED): AttemptOutcome.RUNNING,
    (AttemptOutcome.COMMITTED, AttemptEvent.START_FAILED): AttemptOutcome.ABANDONED,
}


def next_outcome(outcome: AttemptOutcome, event: AttemptEvent) -> AttemptOutcome:
    """A destination's record of a migration after an event. An event that has no arrow in the drawing changes nothing."""
    return _ATTEMPT.get((outcome, event), outcome)


def answer(outcome: AttemptOutcome) -> AttemptOutcome | None:
    """What the source is told after it ASKED; None: not before the guest has been started, or could not be."""
    return None if outcome is AttemptOutcome.COMMITTED else outcome


def told(outcome: AttemptOutcome) -> Event:
    """What an answer is to the source."""
    return {AttemptOutcome.RUNNING: Event.RUNS, AttemptOutcome.ABANDONED: Event.ABANDONED}.get(
        outcome, Event.UNKNOWN
    )


class NotTheOwner(Error):
    """The guest is not to run here: it is not this machine's, or nobody knows. One line that says what can be done."""


_WHY_NOT = {
    OwnershipState.ABSENT: "no guest has come here yet",
    OwnershipState.ARRIVED: (
        "the guest may still run at the QEMU that it came from: look there; if it does not and never will, force it: "
        "'cont -f' (QMP: cont with x-sterna-force)"
    ),
    OwnershipState.IN_DOUBT: (
        "the guest may run at the migration's destination: look there; 'resolve_doubt' (QMP: x-sterna-resolve-doubt) finds "
        "out what can be found out from here; "
        "if the guest does not run there and never will, force it: 'cont -f' (QMP: cont with x-sterna-force)"
    ),
    OwnershipState.AWAY: "the guest has migrated and runs at the destination",
    OwnershipState.SAVED: "the guest was saved, and stands still: 'cont' first",
    OwnershipState.HANDED_ON: (
        "all of the guest was handed to a command or descriptor, and may run where that led; if it does not and never will, "
        "force it: 'cont -f' (QMP: cont with x-sterna-force)"
    ),
}


class Ownership:
    """What one machine holds. It changes by events only; calls may come from any thread."""

    def __init__(self, state: OwnershipState) -> None:
        self._lock = threading.Lock()
        self._hold = Hold(state)

    @property
    def hold(self) -> Hold:
        """What the machine holds now."""
        return self._hold

    @property
    def state(self) -> OwnershipState:
        """The hold's state."""
        return self._hold.state

    @property
    def may_run(self) -> bool:
        """As the function of that name."""
        return may_run(self._hold)

    @property
    def may_migrate(self) -> bool:
        """As the function of that name."""
        return may_migrate(self._hold)

    def require_owner(self) -> None:
        """
        :raise NotTheOwner: When no vCPU may run guest code here.
        """
        if not self.may_run:
            raise NotTheOwner(_WHY_NOT[self.state])

    def apply(self, event: Event, migration: bytes = b"", *, watched: bool = False) -> OwnershipState:
        """An event happened; as `next_hold`.

        :return: the state after it
        """
        with self._lock:
            self._hold = next_hold(self._hold, event, migration, watched=watched)
            return self._hold.state
