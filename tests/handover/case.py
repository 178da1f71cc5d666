"""One migration with one fault, and what must hold afterwards."""

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.handover.ends import TIMEOUT, DoubleEnd, End, EndedError, State, cont, kill, stop
from tests.handover.relay import Address, Direction, Mode, Place, Relay

from sterna.jit.ahead import fetch_kernels

BRIEF_SECONDS = 0.2
_NEVER_MS = 50_000
"""A time limit that does not pass by itself."""
_ASK_MS = 300
"""How long a source asks that will get no answer."""


class Done(Enum):
    """What is done to the migration."""

    KILL_SOURCE = "kill source"
    KILL_DESTINATION = "kill destination"
    QUIT_DESTINATION = "quit destination"
    CUT = "cut"
    RESET = "reset"
    HALF_FORWARD = "half cut forward"
    HALF_BACK = "half cut back"
    STOP_SOURCE = "stop source"
    STOP_DESTINATION = "stop destination"


KILLS = (Done.KILL_SOURCE, Done.KILL_DESTINATION)
CUTS = (Done.CUT, Done.RESET, Done.HALF_FORWARD, Done.HALF_BACK)
ENDS = (Done.KILL_DESTINATION, Done.QUIT_DESTINATION)
STOPS = (Done.STOP_SOURCE, Done.STOP_DESTINATION)

DESTINATION_CALLS = ("load_devices", "advance_counter", "announce", "resume")
SOURCE_CALLS = ("stop_for_migration", "save_devices", "migrated_away")


@dataclass(frozen=True)
class Call:
    """A place: where an end calls this method of its guest."""

    destination: bool
    name: str


@dataclass(frozen=True)
class Case:
    """A migration with a fault.

    :ivar cut_too: a kill or a stop also cuts the connection, so that what was under way is lost
    :ivar long: a stop lasts until the source has its outcome; else for a moment
    :ivar silent: what a half cut loses is lost without a word, else that direction is shut
    :ivar alone: the destination has a PID namespace of its own
    :ivar moving: the guest writes to its memory meanwhile
    """

    done: Done
    address: Address
    place: Place | Call
    unix: bool = False
    alone: bool = False
    cut_too: bool = False
    long: bool = False
    silent: bool = False
    moving: bool = False

    @property
    def waits(self) -> bool:
        """The source hears nothing more, and not even that: it goes on when its time limit passes."""
        return self.silent or (self.long and not self.cut_too)

    @property
    def parameters(self) -> dict[str, object]:
        unanswered = self.long or self.address is not Address.NOTHING or self.done in ENDS
        return {
            "x-sterna-policy": "fixed",
            "downtime-limit": 2_000_000,
            "max-bandwidth": 0,
            "x-sterna-switchover-timeout": _NEVER_MS,
            "x-sterna-doubt-timeout": _ASK_MS if unanswered else _NEVER_MS,
        }


class Ends(Enum):
    """How a migration ended, as the source's user sees it first, or later."""

    SOURCE = "runs at source"
    DESTINATION = "runs at destination"
    IN_DOUBT = "in doubt"
    BOTH = "both"
    NONE = "none"


@dataclass
class Verdict:
    """What came of a case.

    :ivar first: when the source had its outcome, everyone goes on, and nobody has asked again
    :ivar last: after `resolve_doubt` at the destination's true address, and ``cont`` where that allows it
    :ivar wrong: what must not be
    """

    first: Ends
    last: Ends
    wrong: list[str] = field(default_factory=list)


class Second:
    """A destination that knows nothing of any of it, and what must never happen there."""

    def __init__(self) -> None:
        self.end = DoubleEnd(incoming="tcp:127.0.0.1:0")
        self._lock = threading.Lock()

    @property
    def runs(self) -> bool:
        """Whether it runs a guest; cases that run at the same time ask."""
        with self._lock:
            return self.end.state().running


def run_case(case: Case, second: Second) -> Verdict:
    """Run a case with `DoubleGuest`s."""
    with TemporaryDirectory(prefix="sterna-soak-") as name, ExitStack() as stack:
        folder = Path(name)
        call = case.place if isinstance(case.place, Call) else None
        source = DoubleEnd(
            moving=case.moving, at_call=call.name if call is not None and not call.destination else ""
        )
        stack.callback(source.close)
        destination = DoubleEnd(
            incoming=f"unix:{folder}/destination" if case.unix else "tcp:127.0.0.1:0",
            alone=case.alone,
            at_call=call.name if call is not None and call.destination else "",
        )
        stack.callback(destination.close)
        run = Run(case, folder, source, destination, destination.address, second)
        if call is not None:
            run.watch_call(destination if call.destination else source)
        return run.verdict()


class Run:
    """A case under way. Both ends exist."""

    def __init__(
        self, case: Case, folder: Path, source: End, destination: End, address: str, second: Second
    ) -> None:
        self.case = case
        self.source, self.destination, self.address, self.second = source, destination, address, second
        place = case.place if isinstance(case.place, Place) else None
        self.relay = Relay(folder, case.unix, address, second.end.address, place, self._act)
        self._stopped: int | None = None
        self._committed = False
        self._timer: threading.Timer | None = None
        self._acted = threading.Event()
        self._failed: list[BaseException] = []
        self._watcher: threading.Thread | None = None

    # -- the fault -------------------------------------------------------------------------------------------

    def watch_call(self, end: DoubleEnd) -> None:
        """Act when that end comes to its call."""

        def wait() -> None:
            try:
                end.calls.recv()
                mode = self._act()
                self.relay.interrupt(mode)
                end.calls.send("go on")
            except (EOFError, ConnectionError):
                pass  # killed

        self._watcher = threading.Thread(target=wait, daemon=True)
        self._watcher.start()

    def _act(self) -> Mode:
        """The fault. Its effect is there when this returns."""
        try:
            return self._really_act()
        except BaseException as error:
            self._failed.append(error)
            raise
        finally:
            self._acted.set()

    def _really_act(self) -> Mode:
        case = self.case
        self.relay.set_address(case.address)
        self._committed = self.relay.committed
        match case.done:
            case Done.KILL_SOURCE:
                kill(self.source.pid)
            case Done.KILL_DESTINATION:
                kill(self.destination.pid)
            case Done.QUIT_DESTINATION:
                self.destination.quit()
            case Done.STOP_SOURCE | Done.STOP_DESTINATION:
                pid = (self.source if case.done is Done.STOP_SOURCE else self.destination).pid
                stop(pid)
                self._stopped = pid
                if not case.long:
                    self._timer = threading.Timer(BRIEF_SECONDS, cont, [pid])
                    self._timer.start()
            case Done.CUT:
                return Mode.CUT
            case Done.RESET:
                return Mode.RESET
            case Done.HALF_FORWARD:
                return Mode.SILENT_FORWARD if case.silent else Mode.HALF_FORWARD
            case Done.HALF_BACK:
                return Mode.SILENT_BACK if case.silent else Mode.HALF_BACK
        return Mode.CUT if case.cut_too else Mode.GO_ON

    # -- afterwards ------------------------------------------------------------------------------------------

    def verdict(self) -> Verdict:
        """Migrate, and judge."""
        told: State | None = None
        wrong: list[str] = []
        with self.relay as relay:
            try:
                self.source.migrate(relay.uri, self.case.parameters)
                if self.case.waits:
                    assert self._acted.wait(TIMEOUT), "the fault never came"
                    self.source.expire()
                told = self.source.outcome()
            except EndedError:
                if self.case.done is not Done.KILL_SOURCE:
                    raise
                # What the source had sent has left its host, and arrives.
                assert relay.settle(TIMEOUT), "the killed source's connection does not end"
            assert self._acted.wait(TIMEOUT), "the fault never came"
            if self._watcher is not None:
                self._watcher.join()
            if self._failed:
                raise self._failed[0]
            knowable = relay.told or self._can_be_asked()
            if self.case.long and self._stopped is not None:
                cont(self._stopped)
        if self._timer is not None:
            self._timer.join()
        first = self._who(told)
        wrong += self._check_doubt(told, knowable)
        last = first
        if told is not None and told.in_doubt and first is not Ends.BOTH:
            last = self._resolve()
        if first is Ends.BOTH:
            wrong.append("both run")
        if last is not first and last is Ends.BOTH:
            wrong.append("both run after asking")
        wrong += self._check_end(last)
        return Verdict(first, last, wrong)

    def _runs(self, end: End) -> bool:
        try:
            return end.state().running
        except EndedError:
            return False

    def _who(self, told: State | None) -> Ends:
        with_word = told is not None and told.in_doubt
        if self.case.done not in ENDS:
            self.destination.settle()
        running = [self._runs(self.source), self._runs(self.destination), self.second.runs]
        if sum(running) > 1:
            return Ends.BOTH
        if with_word:
            return Ends.IN_DOUBT
        if running[0]:
            return Ends.SOURCE
        return Ends.DESTINATION if running[1] else Ends.NONE

    def _can_be_asked(self) -> bool:
        """Whether the source can have learnt who runs the guest otherwise than by its migration's connection."""
        case = self.case
        if case.done in ENDS:
            return not case.alone
        stopped = case.done is Done.STOP_DESTINATION and case.long
        return case.address is Address.NOTHING and not stopped

    def _check_doubt(self, told: State | None, knowable: bool) -> Iterator[str]:
        if told is None:
            return
        if told.in_doubt and self._runs(self.source):
            yield "the source is in doubt, and runs"
        # A reset can destroy what the source has not read yet.
        unsure = self.case.done is Done.RESET and self.relay.told
        should = told.commit_sent and not knowable
        if told.commit_sent is None:
            should = told.in_doubt and not knowable
        if told.in_doubt != should and not unsure:
            yield f"in doubt: {told.in_doubt}, should be {should}: {told.error}"

    def _resolve(self) -> Ends:
        """The user asks at the destination's true address, and runs the guest here if it is this machine's."""
        found = self.source.resolve(self.address)
        if "this machine's" in found:
            self.source.go_on()
        return self._who(State(False, in_doubt=not found))

    def _check_end(self, last: Ends) -> Iterator[str]:
        case, returned = self.case, self.relay.returned
        if last is Ends.IN_DOUBT and not (case.done in ENDS and case.alone):
            yield "asking at the destination's true address does not end the doubt"
        ended_with_it = case.done is Done.QUIT_DESTINATION and self._committed
        if case.done not in KILLS and last is Ends.NONE and not ended_with_it:
            yield "none runs, though none was killed"
        if case.done is Done.KILL_SOURCE and returned.running and last is not Ends.DESTINATION:
            yield "the destination said that it runs the guest, and does not"
        if (
            case.done is Done.KILL_SOURCE
            and not case.cut_too
            and self.relay.committed
            and last is not Ends.DESTINATION
        ):
            yield "the destination was given all of COMMIT, and does not run the guest"
        if case.done is Done.KILL_DESTINATION and last is Ends.NONE and not returned.running:
            yield "the destination was killed before it said that it ran, and the source does not run"
        runner = {Ends.SOURCE: self.source, Ends.DESTINATION: self.destination}.get(last)
        if runner is not None:
            problem = runner.problem()
            if problem:
                yield f"wrong content: {problem}"


# -- drawing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Bytes that a migration without a fault takes."""

    forward: int
    back: int
    after_ready: int


def measure(second: Second) -> Lengths:
    """The lengths of a guest that stands still; process numbers and clocks vary them by a few bytes."""
    with TemporaryDirectory(prefix="sterna-soak-") as name, ExitStack() as stack:
        source, destination = DoubleEnd(), DoubleEnd(incoming="tcp:127.0.0.1:0")
        stack.callback(source.close)
        stack.callback(destination.close)
        case = Case(Done.CUT, Address.NOTHING, Call(True, ""))
        run = Run(case, Path(name), source, destination, destination.address, second)
        with run.relay as relay:
            source.migrate(relay.uri, case.parameters)
            assert source.outcome().status == "completed"
        return Lengths(*relay.forwarded, relay.after_ready)


def draw(rng: random.Random, done: Done, number: int, lengths: Lengths, *, alone_too: bool) -> Case:
    """The case with this number among those that do the same: addresses, namespaces and places in turn."""
    address = tuple(Address)[number % len(Address)]
    late = number % 2 == 0
    place: Place | Call
    if late:
        place = rng.choice(
            (
                Place(Direction.FORWARD, lengths.forward - rng.randrange(200)),
                Place(Direction.BACK, lengths.back - rng.randrange(100)),
                Place(Direction.AFTER_READY, rng.randrange(lengths.after_ready + 1)),
            )
        )
    elif rng.random() < 0.4:
        destination = rng.random() < 0.6
        place = Call(destination, rng.choice(DESTINATION_CALLS if destination else SOURCE_CALLS))
    else:
        place = rng.choice(
            (
                Place(Direction.FORWARD, rng.randrange(lengths.forward)),
                Place(Direction.BACK, rng.randrange(lengths.back)),
            )
        )
    at_end = isinstance(place, Call) or place.direction is Direction.AFTER_READY
    return Case(
        done,
        address,
        place,
        unix=address is Address.GONE or rng.random() < 0.4,
        alone=alone_too and rng.random() < 0.5,
        cut_too=done in (*KILLS, *ENDS, *STOPS) and rng.random() < 0.4,
        # Before the guest has stopped, whoever is silent is waited for.
        long=done is Done.STOP_DESTINATION and at_end and not _early(place) and rng.random() < 0.7,
        silent=done in (Done.HALF_FORWARD, Done.HALF_BACK) and at_end and not _early(place),
        moving=not late and rng.random() < 0.5,
    )


def _early(place: Place | Call) -> bool:
    return isinstance(place, Call) and place.name == "stop_for_migration"


@contextmanager
def a_second() -> Iterator[Second]:
    """A destination of no use, for many cases."""
    fetch_kernels()  # no end is waited for while it compiles them
    second = Second()
    try:
        yield second
    finally:
        second.end.close()
