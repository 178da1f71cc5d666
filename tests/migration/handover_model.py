"""All that can happen to a guest between a source and a destination, as a graph to search.

The ends' decisions are the functions of `sterna.ownership`, which the program calls as well. Around them this file has what the
program's threads, sockets and users do, in steps as small as another can come between:

- a message is delivered, lost, or delivered and kept to come once more; each may stay under way as long as it likes, so any order
  is possible;
- a process that takes no step while others do is one that is stopped (SIGSTOP, a frozen container); each may be killed at any
  step;
- the listening address leads to the destination, to nobody (refused), or to a second sterna that knows nothing;
- the destination may pass its guest on to a third machine;
- the user quits a destination, which takes its time: what is under way there goes on until its threads have ended;
- the user cancels, quits a source (a kill), lets the guest go on (`cont`), asks once more (`resolve_doubt`), and migrates again;
- deadlines pass whenever they like.

Two models more have a QEMU at one end, which decides by itself: as destination, and as source.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sterna import ownership
from sterna.ownership import AttemptEvent, AttemptOutcome, Event, Hold, OwnershipState

ON = b"passed on"


@dataclass(frozen=True)
class Rules:
    """The decisions. A test puts a wrong one in."""

    next_hold: Callable[..., Hold] = ownership.next_hold
    next_outcome: Callable[[AttemptOutcome, AttemptEvent], AttemptOutcome] = ownership.next_outcome
    answer: Callable[[AttemptOutcome], AttemptOutcome | None] = ownership.answer
    told: Callable[[AttemptOutcome], Event] = ownership.told
    may_migrate: Callable[[Hold], bool] = ownership.may_migrate


class Message(NamedTuple):
    """:ivar to: "source" or "destination"
    :ivar flag: READY: it watches; COMMIT: it is watched; NACK: the destination has recorded that it abandoned the migration
    """

    to: str
    kind: str
    migration: int
    flag: bool = False
    outcome: AttemptOutcome = AttemptOutcome.UNKNOWN


class State(NamedTuple):
    """:ivar attempt: number of the source's present or last attempt; its id is that number
    :ivar doing: what the source's thread waits for
    :ivar watching: the source holds a descriptor of the destination's process
    :ivar outcomes: the destination's record, by attempt
    :ivar taking: the attempt whose thread has come how far at the destination
    :ivar third: whether a third machine has been given the guest
    :ivar end: the destination ends: "told" to, before any guest was its own, or "done" with that; a kill is none
    :ivar heard: nothing that the destination said of the attempt was lost on its way where its end cannot be seen
    """

    source_alive: bool
    source: Hold
    attempt: int
    doing: str
    watching: bool
    destination_alive: bool
    destination: Hold
    outcomes: tuple[AttemptOutcome, ...]
    taking: tuple[int, str, bool]
    third: bool
    network: frozenset[Message]
    end: str = ""
    heard: bool = True


def identity(attempt: int) -> bytes:
    return bytes([attempt]) * 16


@dataclass(frozen=True)
class Model:
    """:ivar one_host: each process can see the other end
    :ivar attempts: how often the user migrates at the most
    :ivar refuses: a destination that is told to end abandons what is pending before anything else
    :ivar says_so: and tells the source
    """

    one_host: bool
    attempts: int = 1
    rules: Rules = field(default_factory=Rules)
    refuses: bool = True
    says_so: bool = True

    def first(self) -> State:
        return State(
            True,
            Hold(OwnershipState.OWNER),
            0,
            "idle",
            False,
            True,
            Hold(OwnershipState.ABSENT),
            (AttemptOutcome.UNKNOWN,) * (self.attempts + 1),
            (0, "", False),
            False,
            frozenset(),
        )

    def owners(self, state: State) -> list[str]:
        """Who may let the guest run now."""
        return [
            name
            for name, owns in (
                ("source", state.source_alive and ownership.may_run(state.source)),
                ("destination", state.destination_alive and ownership.may_run(state.destination)),
                ("third machine", state.third),
            )
            if owns
        ]

    def steps(self, state: State) -> Iterator[tuple[str, State, bool]]:
        """:return: what happens, what is then, and whether it happens also when nothing goes wrong any more"""
        for told, after, calm in self._steps(state):
            if after is not state:
                useful = frozenset(message for message in after.network if _matters(after, message))
                yield told, after if useful == after.network else after._replace(network=useful), calm

    def _steps(self, state: State) -> Iterator[tuple[str, State, bool]]:
        if state.source_alive:
            yield from self._source(state)
        if state.destination_alive:
            yield from self._destination(state)
        for message in state.network:
            rest = state.network - {message}
            lost = state._replace(network=rest)
            if message.kind == "NACK" and message.flag:
                lost = self._unheard(lost)
            yield f"lost: {message.kind} {message.migration}", lost, False
            deliver = self._to_source if message.to == "source" else self._to_destination
            told = f"{message.to} reads {message.kind} {message.migration}"
            after = deliver(state, message)
            if after is not None:
                yield told, after._replace(network=after.network - {message}), True
                yield (
                    f"{told}, which will come again",
                    after._replace(network=after.network | {message}),
                    False,
                )

    def _hold(self, hold: Hold, event: Event, attempt: int, **options: bool) -> Hold:
        return self.rules.next_hold(hold, event, identity(attempt), **options)

    # -- the source --------------------------------------------------------------------------------------------------------

    def _source(self, state: State) -> Iterator[tuple[str, State, bool]]:
        rules, number = self.rules, state.attempt
        yield "the source is killed", state._replace(source_alive=False), False
        again = self.rules.next_hold(state.source, Event.CONT)
        if state.doing in ("idle", "ask") and again != state.source:
            yield "the user says cont at the source", state._replace(source=again), False
        match state.doing:
            case "idle":
                if number < self.attempts and rules.may_migrate(state.source):
                    network = state.network | {Message("destination", "OFFER", number + 1)}
                    after = state._replace(attempt=number + 1, doing="READY", network=network)
                    yield (
                        f"the user migrates: attempt {number + 1}",
                        after._replace(watching=self.one_host),
                        False,
                    )
            case "READY":
                # Cancelled, a deadline, a lost connection: nothing that lets the destination start was sent.
                yield "the source gives up before COMMIT", state._replace(doing="idle"), True
            case "COMMIT":
                commit = Message("destination", "COMMIT", number, state.watching)
                yield (
                    "the kernel takes COMMIT",
                    state._replace(doing="RUNNING", network=state.network | {commit}),
                    True,
                )
                cut = self._hold(state.source, Event.COMMIT_CUT, number)
                yield (
                    "the kernel does not take all of COMMIT",
                    state._replace(source=cut, doing="idle"),
                    False,
                )
            case "RUNNING":
                # The connection of a destination that has ended ends by itself, behind all that it has said.
                spoke = any(message.to == "source" for message in state.network)
                left = state if state.end == "done" and not spoke else self._unheard(state)
                for event in (Event.CONNECTION_LOST, Event.DEADLINE):
                    after = self._hold(state.source, event, number)
                    yield (
                        f"the source waits no longer: {event.value}",
                        left._replace(source=after, doing="ask"),
                        True,
                    )
            case "ask":
                yield from self._ask(state)

    def _ask(self, state: State) -> Iterator[tuple[str, State, bool]]:
        """The address may lead to the destination, to nobody, or to a second sterna there, at each try anew."""
        question = Message("destination", "ASK", state.attempt)
        yield "the source asks", state._replace(network=state.network | {question}), True
        second = self.rules.told(self.rules.answer(AttemptOutcome.UNKNOWN) or AttemptOutcome.UNKNOWN)
        for event in (
            Event.CONNECTION_REFUSED,
            Event.NO_ANSWER,
            Event.DEADLINE,
            Event.CANCELLED,
            second,
        ):
            yield f"the source asks: {event.value}", self._settled(state, event), False
        if state.watching and not state.destination_alive:
            yield (
                "the source sees the destination's process end",
                self._settled(state, Event.PROCESS_ENDED),
                True,
            )

    def _unheard(self, state: State) -> State:
        """Something that the destination says does not reach the source, which can still see its process end on this host."""
        return state if self.one_host else state._replace(heard=False)

    def _settled(self, state: State, event: Event) -> State:
        after = self._hold(state.source, event, state.attempt)
        return state._replace(source=after, doing="ask" if after.state is OwnershipState.IN_DOUBT else "idle")

    def _to_source(self, state: State, message: Message) -> State | None:
        waits = message.migration == state.attempt
        if state.doing == "COMMIT" and waits:
            return None  # it is read when COMMIT is sent
        match message.kind:
            case "READY" if waits and state.doing == "READY":
                after = self._hold(state.source, Event.COMMIT_SENT, state.attempt)
                return state._replace(source=after, doing="COMMIT", watching=state.watching and message.flag)
            case "NACK" if waits and state.doing == "READY":
                return state._replace(doing="idle")
            case "NACK" if state.doing == "RUNNING" and not message.flag:
                # It was refused, and nothing decided: the source asks.
                return self._unheard(state)._replace(doing="ask")
            case "NACK" if state.doing == "RUNNING":
                # It may be of an earlier migration: whether it counts is not decided here.
                hold = self._hold(state.source, Event.ABANDONED, message.migration)
                if hold.state is OwnershipState.IN_DOUBT:
                    return self._unheard(state)._replace(doing="ask")
                return state._replace(source=hold, doing="idle")
            case "RUNNING" if waits and state.doing == "RUNNING":
                after = self._settled(state, Event.RUNS)
                return after._replace(
                    network=after.network | {Message("destination", "CONFIRM", state.attempt)}
                )
            case "ANSWER" if state.doing == "ask":
                event = self.rules.told(message.outcome)
                hold = self._hold(state.source, event, message.migration)
                if hold.state is OwnershipState.IN_DOUBT:
                    return state
                confirm = {Message("destination", "CONFIRM", state.attempt)} if event is Event.RUNS else set()
                return state._replace(source=hold, doing="idle", network=state.network | confirm)
            case _:
                return state

    # -- the destination ---------------------------------------------------------------------------------------------------

    def _destination(self, state: State) -> Iterator[tuple[str, State, bool]]:
        number, step, watched = state.taking
        yield "the destination is killed", state._replace(destination_alive=False, end=""), False
        here = step in ("committed", "taken over") or state.destination.state is not OwnershipState.ABSENT
        if not state.end and not here:
            yield "the destination is told to end", self._end(state), False
        if state.end and step in ("", "started"):
            yield "the destination has ended", state._replace(destination_alive=False, end="done"), True
        match step:
            case "loading":
                ready = Message("source", "READY", number, self.one_host)
                yield (
                    "the destination has loaded all",
                    state._replace(taking=(number, "ready", False), network=state.network | {ready}),
                    True,
                )
                yield "the destination gives up", self._give_up(state), bool(state.end)
            case "ready":
                # Cancelled, a deadline, a lost connection, an error.
                yield "the destination gives up", self._give_up(state), True
            case "committed":
                hold = self._hold(state.destination, Event.TAKEN_OVER, number, watched=watched)
                yield (
                    "the destination takes the guest over",
                    state._replace(destination=hold, taking=(number, "taken over", watched)),
                    True,
                )
                yield "the destination's connection is lost", self._give_up(state), False
            case "taken over":
                outcomes = self._record(state, number, AttemptEvent.STARTED)
                running = Message("source", "RUNNING", number)
                yield (
                    "the destination starts the guest",
                    state._replace(
                        outcomes=outcomes,
                        taking=(number, "started", watched),
                        network=state.network | {running},
                    ),
                    True,
                )
                back = self._hold(state.destination, Event.GIVEN_BACK, number)
                yield (
                    "the destination cannot start the guest",
                    state._replace(destination=back, taking=(number, "failed", watched)),
                    False,
                )
                yield "the destination's connection is lost", self._give_up(state), False
            case "failed":
                nack = Message("source", "NACK", number, True)
                yield (
                    "the destination says so",
                    state._replace(
                        outcomes=self._record(state, number, AttemptEvent.START_FAILED),
                        taking=(0, "", False),
                        network=state.network | {nack},
                    ),
                    True,
                )
        if self.one_host and not state.source_alive and state.destination.watched:
            hold = self._hold(state.destination, Event.SOURCE_ENDED, number)
            yield "the destination sees the source's process end", state._replace(destination=hold), True
        if step == "started" and not state.third and self.rules.may_migrate(state.destination):
            hold = self.rules.next_hold(state.destination, Event.COMMIT_SENT, ON)
            hold = self.rules.next_hold(hold, Event.RUNS, ON)
            yield "the destination passes the guest on", state._replace(destination=hold, third=True), False

    def _end(self, state: State) -> State:
        if self.refuses:
            for number in range(1, len(state.outcomes)):
                state = state._replace(outcomes=self._record(state, number, AttemptEvent.GIVEN_UP))
        return state._replace(end="told")

    def _record(self, state: State, number: int, event: AttemptEvent) -> tuple[AttemptOutcome, ...]:
        outcomes = list(state.outcomes)
        outcomes[number] = self.rules.next_outcome(outcomes[number], event)
        return tuple(outcomes)

    def _give_up(self, state: State) -> State:
        number = state.taking[0]
        outcomes = self._record(state, number, AttemptEvent.GIVEN_UP)
        if outcomes[number] is not AttemptOutcome.ABANDONED:
            return state
        nack = {Message("source", "NACK", number, True)} if self.says_so or not state.end else set()
        taking = (0, "", False) if state.taking[1] != "taken over" else state.taking
        return state._replace(outcomes=outcomes, taking=taking, network=state.network | nack)

    def _to_destination(self, state: State, message: Message) -> State | None:
        number = message.migration
        nack = Message("source", "NACK", number)
        match message.kind:
            case "OFFER" if state.end and self.refuses:
                return state._replace(network=state.network | {nack})
            case "OFFER":
                outcomes = self._record(state, number, AttemptEvent.OFFER)
                if state.taking[1] or outcomes == state.outcomes:
                    return (
                        state._replace(network=state.network | {nack}) if state.taking[0] != number else state
                    )
                return state._replace(outcomes=outcomes, taking=(number, "loading", False))
            case "COMMIT":
                outcomes = self._record(state, number, AttemptEvent.COMMIT)
                if outcomes[number] is AttemptOutcome.ABANDONED:
                    gone = state.taking[0] == number
                    taking = (0, "", False) if gone else state.taking
                    return state._replace(taking=taking, network=state.network | {nack._replace(flag=True)})
                if outcomes == state.outcomes:
                    return state
                return state._replace(outcomes=outcomes, taking=(number, "committed", message.flag))
            case "ASK":
                asked = state._replace(outcomes=self._record(state, number, AttemptEvent.ASKED))
                outcome = self.rules.answer(asked.outcomes[number])
                if outcome is None:
                    return None  # the guest is being started
                answer = Message("source", "ANSWER", number, outcome=outcome)
                return asked._replace(network=asked.network | {answer})
            case "CONFIRM" if state.outcomes[number] is AttemptOutcome.RUNNING:
                return state._replace(destination=self._hold(state.destination, Event.CONFIRMED, number))
            case _:
                return state


def _matters(state: State, message: Message) -> bool:
    """Whether a message can still change anything. Without those that cannot there are a tenth of the states."""
    if message.to == "source":
        if not state.source_alive:
            return False
        late = message.migration < state.attempt
        return not (
            late and (message.kind in ("READY", "RUNNING") or (message.kind == "NACK" and not message.flag))
        )
    if not state.destination_alive:
        return False
    match message.kind:
        case "OFFER":
            return state.outcomes[message.migration] is AttemptOutcome.UNKNOWN
        case "CONFIRM":
            return (
                state.destination.watched or state.outcomes[message.migration] is not AttemptOutcome.RUNNING
            )
        case "ASK":
            return (
                message.migration == state.attempt
                or state.outcomes[message.migration] is AttemptOutcome.PENDING
            )
        case _:
            return True


class QemuState(NamedTuple):
    """:ivar doing: what the source does: "loading" (it waits for the answer to its ping), "end", "SHUT", "over"
    :ivar qemu: how far QEMU is: "loading", "loaded", "running", "gone"
    :ivar network: END to QEMU; PONG, SHUT(0), SHUT(1) to the source
    """

    source: Hold
    doing: str
    qemu: str
    network: frozenset[str]


@dataclass(frozen=True)
class QemuModel:
    """A QEMU as destination: it starts the guest by itself, and nobody can ask it."""

    rules: Rules = field(default_factory=Rules)

    def first(self) -> QemuState:
        return QemuState(Hold(OwnershipState.OWNER), "loading", "loading", frozenset())

    def owners(self, state: QemuState) -> list[str]:
        names = (("source", ownership.may_run(state.source)), ("QEMU", state.qemu == "running"))
        return [name for name, owns in names if owns]

    def steps(self, state: QemuState) -> Iterator[tuple[str, QemuState, bool]]:
        def hold(event: Event) -> Hold:
            return self.rules.next_hold(state.source, event, identity(1))

        match state.doing:
            case "loading":
                yield "the source gives up before the end", state._replace(doing="over"), True
            case "end":
                cut = state._replace(source=hold(Event.COMMIT_CUT), doing="over")
                yield "the kernel takes nothing of the end", cut, False
                sent = state._replace(doing="SHUT", network=state.network | {"END"})
                yield "the kernel takes the end", sent, True
            case "SHUT":
                for event in (Event.CONNECTION_LOST, Event.DEADLINE, Event.CANCELLED, Event.NO_ANSWER):
                    after = state._replace(source=hold(event), doing="over")
                    yield f"the source waits no longer: {event.value}", after, False
        if state.doing == "over":
            cont = self.rules.next_hold(state.source, Event.CONT)
            yield "the user says cont at the source", state._replace(source=cont), False
        if state.qemu == "loading":
            pong = state._replace(qemu="loaded", network=state.network | {"PONG"})
            yield "QEMU has loaded all, and answers the ping", pong, True
        if state.qemu != "gone":
            yield "QEMU ends", state._replace(qemu="gone"), False
        for message in state.network:
            rest = state._replace(network=state.network - {message})
            yield f"lost: {message}", rest, False
            match message:
                case "PONG" if state.doing == "loading":
                    yield (
                        "the source reads PONG",
                        rest._replace(source=hold(Event.COMMIT_SENT), doing="end"),
                        True,
                    )
                case "SHUT(0)" if state.doing in (
                    "SHUT",
                    "over",
                ):  # a connection that is kept is heard later too
                    yield (
                        "the source reads SHUT(0)",
                        rest._replace(source=hold(Event.RUNS), doing="over"),
                        True,
                    )
                case "SHUT(1)" if state.doing in ("SHUT", "over"):
                    after = rest._replace(source=hold(Event.SHUT_WITH_ERROR), doing="over")
                    yield "the source reads SHUT(1)", after, False
                case "END" if state.qemu == "loaded":
                    for value in (0, 1):
                        after = rest._replace(qemu="running", network=rest.network | {f"SHUT({value})"})
                        yield f"QEMU starts the guest and says SHUT({value})", after, value == 0


class QemuSourceState(NamedTuple):
    """:ivar qemu: the source, which has sent all: "waits" for SHUT, "completed", "runs" the guest again, "gone"
    :ivar kernel: what its kernel has for it to read: "", "SHUT(0)", "SHUT(1)"
    :ivar connected: the connection is whole
    :ivar doing: what the destination does: "loaded", "shut" (SHUT(0) is sent), "taken over", "started", "over", "stays"
    :ivar network: what is on its way to the source's kernel
    """

    qemu: str
    kernel: str
    connected: bool
    destination_alive: bool
    destination: Hold
    doing: str
    network: frozenset[str]


@dataclass(frozen=True)
class QemuSourceModel:
    """A QEMU with a return path as source: it gives its guest up when it reads SHUT(0), and goes on when that never comes.

    :ivar starts_last: the guest is started when SHUT(0) is where the connection leads to; else first, and SHUT(0) is sent then
    :ivar late_cancel: the user cancels at the QEMU between SHUT(0)'s arrival and its being read, which is outside the claim
    """

    rules: Rules = field(default_factory=Rules)
    starts_last: bool = True
    late_cancel: bool = False

    def first(self) -> QemuSourceState:
        return QemuSourceState("waits", "", True, True, Hold(OwnershipState.ABSENT), "loaded", frozenset())

    def owners(self, state: QemuSourceState) -> list[str]:
        here = state.destination_alive and ownership.may_run(state.destination)
        names = (("QEMU", state.qemu == "runs"), ("destination", here))
        return [name for name, owns in names if owns]

    def steps(self, state: QemuSourceState) -> Iterator[tuple[str, QemuSourceState, bool]]:
        if state.qemu == "waits":
            yield from self._qemu(state)
        if state.qemu != "gone":
            yield "QEMU is killed", state._replace(qemu="gone", connected=False, network=frozenset()), False
        if state.connected:
            cut = state._replace(connected=False, network=frozenset())
            yield "the connection breaks, and what is on its way is lost", cut, False
        for message in state.network:
            arrived = state._replace(kernel=message, network=state.network - {message})
            yield f"{message} arrives at QEMU's host", arrived, True
        if state.destination_alive:
            yield "the destination is killed", state._replace(destination_alive=False, connected=False), False
            yield from self._destination(state)

    def _qemu(self, state: QemuSourceState) -> Iterator[tuple[str, QemuSourceState, bool]]:
        if state.kernel:
            after = "completed" if state.kernel == "SHUT(0)" else "runs"
            yield f"QEMU reads {state.kernel}", state._replace(qemu=after), True
        elif not state.connected:
            yield "QEMU finds its return path broken", state._replace(qemu="runs"), True
        if state.kernel != "SHUT(0)" or self.late_cancel:
            cancelled = state._replace(qemu="runs", connected=False, network=frozenset())
            yield "the user cancels at QEMU", cancelled, False

    def _destination(self, state: QemuSourceState) -> Iterator[tuple[str, QemuSourceState, bool]]:
        def hold(event: Event, before: Hold = state.destination) -> Hold:
            return self.rules.next_hold(before, event, identity(1))

        def sent(message: str) -> frozenset[str]:
            return state.network | ({message} if state.connected else set())

        match state.doing:
            case "loaded":
                gives_up = state._replace(doing="over", network=sent("SHUT(1)"))
                yield "the destination gives up, and says SHUT(1)", gives_up, False
                if not state.connected:
                    yield "the destination sees the connection's end", state._replace(doing="over"), True
                if self.starts_last:
                    shut = state._replace(destination=hold(Event.SHUT_SENT), doing="shut")
                    yield "the kernel takes SHUT(0)", shut._replace(network=sent("SHUT(0)")), True
                    cut = hold(Event.SHUT_CUT, shut.destination)
                    yield (
                        "the kernel does not take all of SHUT(0)",
                        state._replace(destination=cut, doing="over", connected=False),
                        False,
                    )
                else:
                    taken = state._replace(destination=hold(Event.TAKEN_OVER), doing="taken over")
                    yield "the destination starts the guest", taken, True
            case "shut":
                if state.kernel == "SHUT(0)":
                    taken = state._replace(destination=hold(Event.TAKEN_OVER), doing="started")
                    yield "SHUT(0) is known to have arrived: the destination starts the guest", taken, True
                yield "the destination waits no longer", state._replace(doing="stays"), not state.connected
            case "taken over":
                said = state._replace(doing="started", network=sent("SHUT(0)"))
                yield "the kernel takes SHUT(0)", said, True
            case "over" | "stays":
                cont = self.rules.next_hold(state.destination, Event.CONT)
                yield "the user says cont at the destination", state._replace(destination=cont), False


@dataclass
class Found:
    """:ivar states: how many were looked at
    :ivar problem: what is wrong; empty when nothing is
    :ivar timeline: how it comes to that, step by step
    """

    states: int
    problem: str = ""
    timeline: list[str] = field(default_factory=list)


def search(model: Model | QemuModel | QemuSourceModel) -> Found:
    """Look at every state that can come about.

    There are never two owners. And between two sternas, as long as no process was killed, everything that is still possible when
    nothing goes wrong any more leads to exactly one; so it does where a destination ended by its user's word before the guest was
    its own, unless what it said last was lost and nobody sees its process end.
    """
    first: Any = model.first()
    came: dict[Any, tuple[Any, str] | None] = {first: None}
    calm_from: dict[Any, list[Any]] = {}
    ends: list[Any] = []
    waiting = deque([first])
    while waiting:
        state = waiting.popleft()
        if len(owners := model.owners(state)) > 1:
            return Found(len(came), f"the guest runs at {' and '.join(owners)}", _timeline(came, state))
        whole = _is_whole(state)
        moves = False
        for told, after, calm in model.steps(state):
            if after == state:
                continue
            if calm and whole:
                moves = True
                calm_from.setdefault(after, []).append(state)
            if after not in came:
                came[after] = state, told
                waiting.append(after)
        if whole and not moves:
            ends.append(state)
    for state in ends:
        if len(model.owners(state)) != 1:
            return Found(len(came), "nobody has the guest", _timeline(came, state))
    reached, waiting = set(ends), deque(ends)
    while waiting:
        for before in calm_from.get(waiting.popleft(), ()):
            if before not in reached:
                reached.add(before)
                waiting.append(before)
    for state in came:
        if _is_whole(state) and state not in reached:
            return Found(len(came), "it never ends", _timeline(came, state))
    return Found(len(came))


def _is_whole(state: Any) -> bool:
    """Whether no process was lost for ever, and the source can know of the destination's end."""
    if isinstance(state, QemuSourceState):
        return state.connected and state.destination_alive and state.qemu != "gone" and state.doing != "stays"
    if not isinstance(state, State) or not state.source_alive:
        return False
    return state.heard if state.end else state.destination_alive


def _timeline(came: dict[Any, tuple[Any, str] | None], state: Any) -> list[str]:
    steps = []
    while (before := came[state]) is not None:
        state, told = before
        steps.append(told)
    return [f"{number:3}  {told}" for number, told in enumerate(reversed(steps), 1)]
