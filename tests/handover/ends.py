"""The two ends of a migration, each a process of its own that can be killed and stopped."""

import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from tests.handover.relay import connect

from sterna.migration.controller import MigrationController
from sterna.migration.errors import InDoubt, MigrationError
from sterna.migration.outcome_query import ANSWER_BYTES, QUESTION
from sterna.ownership import Event
from sterna.testing.guest import DoubleGuest

TIMEOUT = 300.0
"""Seconds that nothing here takes, on any machine."""

_CLONE_NEWPID = 0x20000000
_PR_SET_PDEATHSIG = 1
_processes = get_context("forkserver")
_processes.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class State:
    """What an end says of its guest.

    :ivar commit_sent: a source handed COMMIT to its kernel; None where it does not tell
    """

    running: bool
    in_doubt: bool = False
    status: str = ""
    error: str = ""
    commit_sent: bool | None = False


class End(Protocol):
    """One end. A call to one that is dead raises `EndedError`."""

    pid: int

    def migrate(self, uri: str, parameters: dict[str, object]) -> None: ...
    def expire(self) -> None:
        """The time limit of the switchover passes."""
        ...

    def outcome(self) -> State:
        """Wait for the end of the migration."""
        ...

    def state(self) -> State: ...
    def settle(self) -> None:
        """Wait until a destination has done with all connections that were made to it."""
        ...

    def resolve(self, uri: str) -> str:
        """Ask who runs the guest; empty when the doubt stays."""
        ...

    def go_on(self) -> None:
        """``cont``."""
        ...

    def quit(self) -> None:
        """Tell it to end. When this returns it takes no guest over any more; it has its time for the rest."""
        ...

    def problem(self) -> str:
        """What is wrong with the content of a guest that runs, which may write some more first; empty for nothing."""
        ...

    def close(self) -> None: ...


class EndedError(Exception):
    """The process has ended."""


def kill(pid: int) -> None:
    """Kill, and wait until the process has ended."""
    fd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([fd], [], [], TIMEOUT)[0], "it does not die"
    finally:
        os.close(fd)


def stop(pid: int) -> None:
    """Stop, and wait until no thread of the process runs."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + TIMEOUT
    while not all(_thread_state(task) in "TZX" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline, "it does not stop"
        os.sched_yield()


def _thread_state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def cont(pid: int) -> None:
    """Let a process that was stopped go on."""
    os.kill(pid, signal.SIGCONT)


@dataclass
class DoubleEnd:
    """A `DoubleGuest` in a process of its own.

    :ivar address: where a destination listens
    :ivar at_call: a method of its guest; the process says so and waits where it is called
    """

    incoming: str = ""
    moving: bool = False
    alone: bool = False
    at_call: str = ""
    pid: int = field(init=False)
    address: str = field(init=False)
    calls: Connection = field(init=False)

    def __post_init__(self) -> None:
        self._control, control = _processes.Pipe()
        self.calls, calls = _processes.Pipe()
        self._process = _processes.Process(
            target=_serve,
            args=(control, calls, self.incoming, self.moving, self.alone, self.at_call),
            daemon=True,
        )
        self._process.start()
        control.close()
        calls.close()
        started = self._result()
        # In a namespace of its own it does not know its number; the process between knows.
        self.pid = started if started else int(self._process.pid or 0)
        self.address = self._result()

    def _result(self) -> Any:
        try:
            if not self._control.poll(TIMEOUT):
                raise AssertionError("no answer from an end")
            result = self._control.recv()
        except (EOFError, ConnectionError) as error:
            raise EndedError from error
        if isinstance(result, BaseException):
            raise result
        return result

    def _call(self, *command: object) -> Any:
        try:
            self._control.send(command)
        except ConnectionError as error:
            raise EndedError from error
        return self._result()

    def migrate(self, uri: str, parameters: dict[str, object]) -> None:
        self._call("migrate", uri, parameters)

    def expire(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)

    def outcome(self) -> State:
        return self._call("outcome")

    def state(self) -> State:
        return self._call("state")

    def settle(self) -> None:
        probe(self.address)
        self._call("settle")

    def resolve(self, uri: str) -> str:
        return self._call("resolve", uri)

    def go_on(self) -> None:
        self._call("go_on")

    def quit(self) -> None:
        self._call("quit")

    def problem(self) -> str:
        return self._call("problem")

    def close(self) -> None:
        with suppress(ProcessLookupError):
            kill(self.pid)
        self._process.join()
        self._process.close()
        self._control.close()
        self.calls.close()


def probe(address: str) -> None:
    """Ask for a migration that nobody knows. Connections are taken in their order: the ones before have been taken then."""
    try:
        sock = connect(address)
    except OSError:
        return  # it listens no more
    with sock, suppress(OSError):
        sock.settimeout(TIMEOUT)
        sock.sendall(QUESTION + bytes(16))
        got = b""
        while len(got) < ANSWER_BYTES and (more := sock.recv(ANSWER_BYTES)):
            got += more


# -- in the process ------------------------------------------------------------------------------------------


def _serve(
    control: Connection, calls: Connection, incoming: str, moving: bool, alone: bool, at_call: str
) -> None:
    if alone:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWPID) != 0:
            control.send(OSError(ctypes.get_errno(), "unshare"))
            return
        told, tell = os.pipe()
        child = os.fork()
        if child:
            control.send(child)
            os.close(tell)
            control.close()
            calls.close()
            os.waitpid(child, 0)
            return
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(tell)
        os.read(told, 1)  # its number comes before what it says itself
        os.close(told)
    else:
        control.send(0)
    _Served(control, calls, incoming, moving, at_call).loop()
    os._exit(0)


class _Served:
    def __init__(
        self, control: Connection, calls: Connection, incoming: str, moving: bool, at_call: str
    ) -> None:
        self._control, self._calls = control, calls
        self._ends = False
        self.guest = DoubleGuest(16, running=not incoming, steps_per_ms=5 if moving else 0)
        self._events: list[Event] = []
        apply = self.guest.ownership.apply

        def recorded(event: Event, *arguments: Any, **options: Any) -> Any:
            self._events.append(event)
            return apply(event, *arguments, **options)

        self.guest.ownership.apply = recorded  # type: ignore[method-assign]
        if at_call:
            self._wait_at(at_call)
        if not incoming:
            self.guest.advance_steps(40)
        self.controller = MigrationController(self.guest)
        signal.signal(signal.SIGUSR1, self._expire)
        control.send(self.controller.incoming(incoming) if incoming else "")

    def _wait_at(self, name: str) -> None:
        original: Callable[..., Any] = getattr(self.guest, name)
        waited = threading.Event()

        def wait(*arguments: Any) -> Any:
            if not waited.is_set():
                waited.set()
                self._calls.send(name)
                self._calls.recv()
            return original(*arguments)

        setattr(self.guest, name, wait)

    def _expire(self, *_: object) -> None:
        source = self.controller._source
        assert source is not None
        source.context.expire()

    def loop(self) -> None:
        while not self._ends:
            try:
                command, *arguments = self._control.recv()
            except EOFError:
                return
            try:
                result = getattr(self, f"_do_{command}")(*arguments)
            except Exception as error:
                result = AssertionError(f"{command}: {type(error).__name__}: {error}")
            self._control.send(result)
        self.controller.close()

    def _do_quit(self) -> None:
        self._ends = True
        self.controller.refuse_guests()

    def _do_migrate(self, uri: str, parameters: dict[str, object]) -> None:
        self.controller.set_parameters(parameters)
        self.controller.migrate(uri)

    def _do_outcome(self) -> State:
        assert not self.controller.wait(TIMEOUT).status.running, self.controller.info()
        return self._do_state()

    def _do_state(self) -> State:
        info = self.controller.info()
        sent = Event.COMMIT_SENT in self._events and Event.COMMIT_CUT not in self._events
        return State(self.guest.running, info.in_doubt, info.status.value, info.error or "", sent)

    def _do_settle(self) -> None:
        for thread in threading.enumerate():
            if thread.name == "incoming-connection":
                thread.join(TIMEOUT)
                assert not thread.is_alive(), "a connection is served for ever"

    def _do_resolve(self, uri: str) -> str:
        try:
            return self.controller.resolve_doubt(uri)
        except InDoubt:
            return ""

    def _do_go_on(self) -> None:
        self.guest.ownership.apply(Event.CONT)
        try:
            self.guest.resume()
        except MigrationError as error:
            raise AssertionError(f"cont is refused: {error}") from error

    def _do_problem(self) -> str:
        try:
            assert self.guest.running, "it stands still"
            assert self.guest.steps >= 40, f"{self.guest.steps} steps"
            self.guest.advance_steps(5)
            self.guest.check_ram()
        except AssertionError as error:
            return str(error)
        return ""
