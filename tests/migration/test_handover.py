"""Who runs the guest, with real processes, connections and commands."""

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from tests.handover.relay import Direction, Mode, Place, Relay, connect
from tests.migration.pairs import ANYWHERE, TCP, Host, hosts
from tests.migration.proxy import Fault, Proxy

from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.errors import InDoubt, MigrationError, StateError
from sterna.migration.handshake import GREETING, PrivateMessage
from sterna.migration.process import OwnProcess, ProcessIdentity, ProcessWatch, watch
from sterna.migration.source.outcome_query import OutcomeQuery
from sterna.migration.statistics import MigrationInfo, MigrationStatus
from sterna.ownership import AttemptOutcome, Event, NotTheOwner, Ownership, OwnershipState
from sterna.stream import sections
from sterna.stream.return_path import pong, shut
from sterna.stream.wire import Command
from sterna.testing.guest import DoubleGuest

PAGES = 3
SECONDS = 120.0
ROOT = Path(__file__).parents[2]
COMPLETED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.FAILED


def guest() -> DoubleGuest:
    made = DoubleGuest(PAGES, steps_per_ms=0)
    made.advance_steps(1)
    return made


@dataclass
class Elsewhere:
    """A destination in a process of its own, which stops or dies at a call to its guest."""

    process: "subprocess.Popen[str]"
    address: str

    def await_stop(self) -> None:
        """Return when it has stopped itself."""
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def line(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        assert ready
        return self.process.stdout.readline().strip()


@contextmanager
def elsewhere(
    how: str, call: str, uri: str = TCP, prefix: tuple[str, ...] = (), fds: tuple[int, ...] = ()
) -> Iterator[Elsewhere]:
    command = [*prefix, sys.executable, "-m", "tests.migration.mortal", str(PAGES), call, how, uri]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT, pass_fds=fds
    ) as process:
        assert process.stdout is not None
        try:
            yield Elsewhere(process, process.stdout.readline().strip())
        finally:
            process.kill()


def in_doubt(here: Host, info: MigrationInfo) -> None:
    assert (info.status, info.in_doubt) == (FAILED, True), info.error
    assert here.guest.ownership.state is OwnershipState.IN_DOUBT
    assert not here.guest.running
    assert not here.guest.logging
    with pytest.raises(NotTheOwner):
        here.guest.resume()
    with pytest.raises(NotTheOwner, match="may run at"):
        here.controller.migrate(ANYWHERE)


@pytest.mark.slow
def test_a_stopped_destination_whose_address_refuses_is_not_taken_for_dead(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with hosts(guest()) as (here,), elsewhere("stop", "advance_counter", f"unix:{path}") as there:
        here.controller.set_parameters({"x-sterna-doubt-timeout": 500})
        here.controller.migrate(there.address)
        there.await_stop()
        os.rename(path, tmp_path / "moved")
        here.expire()
        in_doubt(here, here.outcome())
        with pytest.raises(InDoubt, match=r"connection refused|no such file"):
            here.controller.resolve_doubt()
        there.go_on()
        assert there.line() == "running"
        found = here.controller.resolve_doubt(f"unix:{tmp_path / 'moved'}")
        assert found == "the guest runs at the destination"
        assert (here.guest.away, here.guest.ownership.state) == (True, OwnershipState.AWAY)
        assert not here.controller.info().in_doubt
        with pytest.raises(StateError, match="no migration is in doubt"):
            here.controller.resolve_doubt()


@pytest.mark.slow
@pytest.mark.parametrize("says", [AttemptOutcome.RUNNING, AttemptOutcome.ABANDONED])
def test_a_question_holds_nobody_up_and_a_guest_that_is_forced_meanwhile_stays(
    tmp_path: Path, says: AttemptOutcome
) -> None:
    path, asked = tmp_path / "d", tmp_path / "asked"
    with (
        hosts(guest()) as (here,),
        elsewhere("stop", "advance_counter", f"unix:{path}") as there,
        socket.socket(socket.AF_UNIX) as silent,
        ThreadPoolExecutor(1) as pool,
    ):
        silent.bind(str(asked))
        silent.listen()
        here.controller.set_parameters({"x-sterna-doubt-timeout": 300})
        here.controller.migrate(there.address)
        there.await_stop()
        os.unlink(path)
        here.expire()
        in_doubt(here, here.outcome())
        found = pool.submit(here.controller.resolve_doubt, f"unix:{asked}")
        connection, _ = silent.accept()
        with connection:
            for call in (here.controller.resolve_doubt, lambda: here.controller.migrate(ANYWHERE)):
                with pytest.raises(StateError, match="is being asked who runs the guest"):
                    call()
            here.controller.set_capabilities({"events": True})
            assert here.controller.info().in_doubt
            here.guest.ownership.apply(Event.FORCED_CONT)
            here.guest.resume()
            data = struct.pack(">8sBQ", b"STRNANS1", says, 5)
            connection.sendall(data + xxhash.xxh32_digest(data))
            assert found.result().startswith("the guest was made to run here by force meanwhile")
        assert ("it runs there too" in found.result()) is (says is AttemptOutcome.RUNNING)
        assert here.guest.running
        assert here.migrate("exec:cat > /dev/null").status is COMPLETED


def test_a_question_that_is_given_up_says_nothing_of_a_destination_that_did_not_answer() -> None:
    """The guest was forced to run here while nobody answered; the destination may have started it all the same."""
    migration = bytes(range(16))
    ownership = Ownership(OwnershipState.OWNER)
    ownership.apply(Event.COMMIT_SENT, migration)
    ownership.apply(Event.FORCED_CONT)
    query = OutcomeQuery(ownership, migration, uris.parse("tcp:127.0.0.1:1"))
    with Cancellation() as ended:
        ended.set()
        with pytest.raises(MigrationError, match=r"was made to run here by force meanwhile$"):
            query.resolve(60, ended)


def test_a_second_sterna_at_the_address_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d"
    monkeypatch.setattr("sterna.migration.outcome_query._RETRY_SECONDS", SECONDS)  # it is asked once
    with (
        hosts(guest(), DoubleGuest(PAGES, running=False)) as (here, second),
        elsewhere("stop", "advance_counter", f"unix:{path}") as there,
    ):
        here.controller.set_parameters({"x-sterna-doubt-timeout": 60_000})
        second.controller.incoming(f"unix:{tmp_path}/second")
        here.controller.migrate(there.address)
        there.await_stop()
        os.rename(path, tmp_path / "moved")
        os.rename(tmp_path / "second", path)
        here.expire()
        info = here.outcome()
        in_doubt(here, info)
        assert "does not know this migration" in info.error
        there.go_on()
        assert there.line() == "running"


@contextmanager
def stopped_in_the_start(directory: Path) -> Iterator[tuple[Host, Elsewhere]]:
    """A source in doubt, and its destination, which is stopped in its start and refuses connections."""
    path = directory / "d"
    with hosts(guest()) as (here,), elsewhere("stop", "advance_counter", f"unix:{path}") as there:
        here.controller.set_parameters({"x-sterna-doubt-timeout": 300})
        here.controller.migrate(there.address)
        there.await_stop()
        os.unlink(path)
        here.expire()
        in_doubt(here, here.outcome())
        yield here, there


def test_the_end_of_the_process_ends_the_doubt_later_too(tmp_path: Path) -> None:
    with stopped_in_the_start(tmp_path) as (here, there):
        there.process.kill()
        there.process.wait()
        assert "it is this machine's" in here.controller.resolve_doubt()
        here.guest.resume()
        assert here.guest.running


def test_a_guest_that_ran_in_a_process_that_has_ended_is_not_said_never_to_have_run(tmp_path: Path) -> None:
    with stopped_in_the_start(tmp_path) as (here, there):
        there.go_on()
        assert there.line() == "running"
        there.process.kill()
        there.process.wait()
        assert here.controller.resolve_doubt() == (
            "the destination's process has ended, and with it the guest, if it ran there: "
            "it is this machine's, and 'cont' runs it"
        )


class EndsAtTheSecondLook(ProcessWatch):
    """A process that ends between two looks."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.looks = 0

    @property
    def ended(self) -> bool:
        self.looks += 1
        return self.looks > 1


def test_a_doubt_that_the_last_look_ends_was_not_ended_by_force() -> None:
    migration = bytes(range(16))
    ownership = Ownership(OwnershipState.OWNER)
    ownership.apply(Event.COMMIT_SENT, migration)
    query = OutcomeQuery(ownership, migration, uris.parse(ANYWHERE), EndsAtTheSecondLook())
    with Cancellation() as closing, pytest.raises(MigrationError, match="process has ended, and with it"):
        query.resolve(0.1, closing)
    assert ownership.state is OwnershipState.OWNER


# -- over an inherited socket, where nobody can be asked -----------------------------------------------------


@contextmanager
def inherited(how: str) -> Iterator[tuple[Host, Elsewhere, str, threading.Event]]:
    """:return: here, there, where to migrate to, and what is set when the source waits no longer for an answer in time"""
    near, far = socket.socketpair()
    with (
        near,
        far,
        hosts(guest()) as (here,),
        elsewhere(how, "advance_counter", f"fd:{far.fileno()}", fds=(far.fileno(),)) as there,
    ):
        far.close()
        given_up = threading.Event()
        apply = here.guest.ownership.apply

        def noted(event: Event, *arguments: Any, **options: Any) -> OwnershipState:
            state = apply(event, *arguments, **options)
            if event is Event.CONNECTION_LOST:
                given_up.set()
            return state

        here.guest.ownership.apply = noted  # type: ignore[method-assign]
        yield here, there, f"fd:{near.fileno()}", given_up


def test_a_destination_that_dies_at_its_start_is_seen_over_an_inherited_socket() -> None:
    with inherited("die") as (here, _, uri, _):
        info = here.migrate(uri)
        assert (info.status, info.in_doubt) == (FAILED, False), info.error
        assert "process has ended, and with it" in info.error
        assert here.guest.running


def test_a_destination_that_dies_later_is_seen_over_an_inherited_socket() -> None:
    with inherited("stop") as (here, there, uri, given_up):
        here.controller.set_parameters({"x-sterna-doubt-timeout": 60_000})
        here.controller.migrate(uri)
        there.await_stop()
        here.expire()
        assert given_up.wait(60)
        there.process.kill()
        info = here.outcome()
        assert (info.status, info.in_doubt) == (FAILED, False), info.error
        assert here.guest.running


@pytest.mark.parametrize("automatic", [True, False])
def test_a_destination_that_starts_late_is_heard_over_an_inherited_socket(automatic: bool) -> None:
    """There is no other connection on which it could be asked."""
    with inherited("stop") as (here, there, uri, given_up):
        limit = 60_000 if automatic else 200
        here.controller.set_parameters({"x-sterna-doubt-timeout": limit})
        here.controller.migrate(uri)
        there.await_stop()
        here.expire()
        assert given_up.wait(60)
        if not automatic:
            info = here.outcome()
            in_doubt(here, info)
            assert info.error.endswith("'resolve_doubt' looks whether the destination has said so since")
        there.go_on()
        assert there.line() == "running"
        if automatic:
            assert here.outcome().status is COMPLETED
        else:
            assert here.controller.resolve_doubt() == "the guest runs at the destination"
        assert (here.guest.away, here.guest.ownership.state) == (True, OwnershipState.AWAY)


def test_a_destination_that_dies_where_nobody_sees_it_leaves_the_doubt(root: None) -> None:
    alone = ("unshare", "--pid", "--fork", "--kill-child")
    with hosts(guest()) as (here,), elsewhere("die", "advance_counter", prefix=alone) as there:
        here.controller.set_parameters({"x-sterna-doubt-timeout": 500})
        in_doubt(here, here.migrate(there.address))


def test_a_start_that_fails_gives_the_guest_back() -> None:
    with hosts(guest(), DoubleGuest(PAGES, running=False)) as (here, there):
        there.guest.fail["resume"] = OSError("no tap")
        info = here.migrate(there.controller.incoming(TCP))
        assert (info.status, info.in_doubt) == (FAILED, False)
        assert "no tap" in info.error
        assert here.guest.running
        there.controller.wait(30)
        assert there.guest.ownership.state is OwnershipState.ABSENT
        del there.guest.fail["resume"]
        assert here.migrate(there.controller.incoming_info().socket_address).status is COMPLETED


def test_a_guest_moves_on_only_when_its_source_asks_no_more() -> None:
    """A source that watches this process would take its end for the guest's."""
    with hosts(guest(), DoubleGuest(PAGES, running=False)) as (here, there):
        migration = bytes(range(16))
        ownership = here.guest.ownership
        ownership.apply(Event.COMMIT_SENT, migration)
        ownership.apply(Event.ABANDONED, migration)
        there.guest.ownership.apply(Event.TAKEN_OVER, migration, watched=True)
        with pytest.raises(StateError, match=r"has not confirmed that it knows.*end that source"):
            there.controller.migrate(ANYWHERE)
        there.guest.ownership.apply(Event.CONFIRMED, migration)
        with pytest.raises(Exception, match="port"):
            there.controller.migrate("tcp:127.0.0.1")


def test_who_lost_the_answer_confirms_on_another_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with hosts(guest(), DoubleGuest(PAGES, running=False)) as (here, there):
        address = there.controller.incoming(TCP)
        incoming = there.controller._incoming
        assert incoming is not None
        with Proxy(int(address.rpartition(":")[2]), Fault(cut_message=PrivateMessage.RUNNING)) as proxy:
            info = here.migrate(proxy.uri)
            assert info.status is COMPLETED, info.error
            incoming._thread.join(30)
        assert incoming.finished, "the source knows, so nobody is waited for"


def test_a_command_that_has_the_guest_is_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be what runs the guest."""
    monkeypatch.chdir(tmp_path)  # a long command is not told whole
    os.mkfifo("full")
    with hosts(guest()) as (here,):
        here.controller.set_parameters({"x-sterna-doubt-timeout": 100})
        here.controller.migrate("exec:echo $$ > pid; cat > stream; echo > full; exec sleep 1000")
        Path("full").read_text()
        here.expire()
        info = here.outcome()
        assert (info.status, info.in_doubt) == (FAILED, True)
        assert "exec sleep 1000 has not ended, after it was given" in info.error
        pid = int((tmp_path / "pid").read_text())
        living = ProcessWatch(os.pidfd_open(pid))
        assert not living.ended
        living.close()
        assert (tmp_path / "stream").stat().st_size > PAGES
        waiting = [thread for thread in threading.enumerate() if thread.name == "exec-exit"]
        os.kill(pid, signal.SIGKILL)
        for thread in waiting:
            thread.join(30)


# -- a destination that ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("close", [True, False], ids=["closed", "told to end"])
def test_a_destination_that_ends_before_it_has_all_of_commit_says_that_it_never_starts(
    tmp_path: Path, close: bool
) -> None:
    """Nobody sees the other's process here, and the address refuses afterwards: there is no other word."""
    with hosts(guest(), DoubleGuest(PAGES, running=False)) as (here, there):
        address = there.controller.incoming(TCP)

        def end() -> Mode:
            if close:
                there.controller.close()
            else:
                there.controller.refuse_guests()
            return Mode.GO_ON

        here.controller.set_parameters({"x-sterna-doubt-timeout": 300})
        with Relay(tmp_path, False, address, address, Place(Direction.AFTER_READY, 20), end) as relay:
            info = here.migrate(relay.uri)
        assert (info.status, info.in_doubt) == (FAILED, False), info.error
        assert info.error == "destination refused: it is ending"
        assert here.guest.running
        there.controller.close()
        assert not there.guest.running
        assert there.controller.info().status is MigrationStatus.CANCELLED


def test_a_destination_that_was_told_to_end_takes_no_guest_over_at_a_new_address() -> None:
    with hosts(guest(), DoubleGuest(PAGES, running=False)) as (here, there):
        there.controller.refuse_guests()
        info = here.migrate(there.controller.incoming(TCP))
        assert (info.status, info.in_doubt) == (FAILED, False), info.error
        assert info.error == "destination refused: it is ending"
        assert here.guest.running


# -- processes -----------------------------------------------------------------------------------------------


@contextmanager
def stating(prefix: tuple[str, ...] = ()) -> Iterator[tuple["subprocess.Popen[bytes]", bytes]]:
    """A process that has stated its identity."""
    code = (
        "import sys; from sterna.migration.process import OwnProcess; import msgspec\n"
        "own = OwnProcess(); sys.stdout.buffer.write(msgspec.json.encode(own.identity) + b'\\n'); sys.stdout.flush()\n"
        "sys.stdin.readline(); own.close(); print('closed', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def test_a_process_is_watched_until_its_end() -> None:
    with stating() as (process, line):
        identity = msgspec.json.decode(line, type=ProcessIdentity)
        watching = watch(identity)
        assert watching is not None
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert not watching.ended
        replaced = msgspec.structs.replace
        for other in (
            replaced(identity, boot="0" * 36),
            replaced(identity, namespace=identity.namespace + 1),
            replaced(identity, start=identity.start + 1),
            replaced(identity, token="sterna-" + "0" * 32),
            replaced(identity, token="../../x"),
            replaced(identity, fd=0),
            replaced(identity, fd=-1),
            replaced(identity, pid=0),
            replaced(identity, pid=1 << 40),
            replaced(identity, pid=-identity.pid),
        ):
            assert watch(other) is None, other
        process.kill()
        process.wait()
        assert watching.ended
        assert watch(identity) is None
        watching.close()
        watching.close()


def test_a_token_that_was_given_up_names_no_process() -> None:
    with stating() as (process, line):
        identity = msgspec.json.decode(line, type=ProcessIdentity)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"closed\n"
        assert watch(identity) is None


def test_a_namespace_whose_proc_is_another_one_states_nothing(root: None) -> None:
    """The numbers in /proc are then not those of pidfd_open."""
    with stating(("unshare", "--pid", "--fork", "--kill-child")) as (_, line):
        assert line == b"null\n"
    with stating(("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")) as (_, line):
        identity = msgspec.json.decode(line, type=ProcessIdentity)
        assert watch(identity) is None


def test_a_process_does_not_watch_itself() -> None:
    own = OwnProcess()
    assert own.identity is not None
    assert watch(own.identity) is None
    own.close()


# -- QEMU ----------------------------------------------------------------------------------------------------


def qemu_double(listener: socket.socket, last: Callable[[socket.socket], None], answer_last: bool) -> None:
    """Takes a stream as QEMU does, and answers its pings; the one behind the devices only if told to."""
    connection, _ = listener.accept()
    with connection:
        taken, number = b"", 0
        while data := connection.recv(1 << 16):
            taken += data
            while True:
                value = GREETING if number == 0 else number
                if sections.command(Command.PING, value.to_bytes(4, "big")) not in taken:
                    break
                behind_devices = b"\x04disk" in taken
                if behind_devices and not answer_last:
                    last(connection)
                    return
                connection.sendall(pong(value).encode())
                number += 1
            if taken.endswith(b"}") and b"vmsd_name" in taken:
                last(connection)
                return


@pytest.mark.parametrize(
    ("answer_last", "last", "doubt"),
    [
        (False, lambda connection: None, False),
        (False, lambda connection: connection.sendall(shut(1).encode()), False),
        (True, lambda connection: None, True),
        (True, lambda connection: connection.sendall(shut(1).encode()), True),
        (True, lambda connection: connection.sendall(b"\xff" * 8), True),
        (True, lambda connection: connection.sendall(shut(0).encode()), None),
    ],
    ids=["dies while loading", "refuses while loading", "dies", "closes with an error", "babbles", "runs it"],
)
def test_only_a_qemus_word_counts(
    answer_last: bool, last: Callable[[socket.socket], None], doubt: bool | None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, hosts(guest()) as (here,):
        thread = threading.Thread(target=qemu_double, args=(listener, last, answer_last), daemon=True)
        thread.start()
        info = here.migrate(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        thread.join(30)
        assert not thread.is_alive()
        if doubt is None:
            assert info.status is COMPLETED, info.error
            assert here.guest.away
        elif doubt:
            in_doubt(here, info)
        else:
            assert (info.status, info.in_doubt) == (FAILED, False), info.error
            assert here.guest.running


@pytest.mark.parametrize("automatic", [True, False])
def test_a_qemu_that_says_late_that_it_runs_the_guest_is_heard(automatic: bool) -> None:
    """Nobody else will ever tell."""
    has_all, say, said = threading.Event(), threading.Event(), threading.Event()

    def late(connection: socket.socket) -> None:
        has_all.set()
        assert say.wait(60)
        connection.sendall(shut(0).encode())
        said.set()

    with socket.create_server(("127.0.0.1", 0)) as listener, hosts(guest()) as (here,):
        thread = threading.Thread(target=qemu_double, args=(listener, late, True), daemon=True)
        thread.start()
        here.controller.set_parameters({"x-sterna-doubt-timeout": 60_000 if automatic else 200})
        here.controller.migrate(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        assert has_all.wait(60)
        if not automatic:
            here.expire()
            info = here.outcome()
            in_doubt(here, info)
            assert "has all of the guest, and has not said that it runs it" in info.error
            with pytest.raises(NotTheOwner, match="may run at the migration's destination"):
                here.guest.resume()
        else:
            here.controller.cancel()  # which changes nothing any more
        say.set()
        assert said.wait(60)
        if automatic:
            assert here.outcome().status is COMPLETED
        else:
            assert here.controller.resolve_doubt() == "the guest runs at the destination"
        assert (here.guest.away, here.guest.ownership.state) == (True, OwnershipState.AWAY)
        thread.join(30)


@pytest.mark.parametrize("destination", ["QEMU", "command", "sterna"])
def test_a_cancel_ends_the_wait_in_doubt_and_not_the_doubt(destination: str, tmp_path: Path) -> None:
    has_all, say, told, full = threading.Event(), threading.Event(), tmp_path / "told", tmp_path / "full"

    def late(connection: socket.socket) -> None:
        has_all.set()
        assert say.wait(SECONDS)
        connection.sendall(shut(0).encode())

    with ExitStack() as stack:
        (here,) = stack.enter_context(hosts(guest()))
        here.controller.set_parameters({"x-sterna-doubt-timeout": int(SECONDS * 1000)})
        if destination == "QEMU":
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            thread = threading.Thread(target=qemu_double, args=(listener, late, True), daemon=True)
            thread.start()
            here.controller.migrate(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
            assert has_all.wait(SECONDS)
        elif destination == "command":
            os.mkfifo(told)
            os.mkfifo(full)
            here.controller.migrate(f"exec:cat > /dev/null; echo > '{full}'; read word < '{told}'")
            full.read_text()
        else:
            there = stack.enter_context(elsewhere("stop", "advance_counter"))
            here.controller.migrate(there.address)
            there.await_stop()
        here.expire()
        while (info := here.controller.wait(0.05)).status.running:
            here.controller.cancel()
        in_doubt(here, info)
        assert "the wait for the destination's word was cancelled" in info.error
        if destination == "QEMU":
            say.set()
            thread.join(SECONDS)
        elif destination == "command":
            told.write_text("word\n")
        else:
            there.go_on()
            assert there.line() == "running"
        word = "the command has all of the guest" if destination == "command" else "the guest runs at"
        assert here.controller.resolve_doubt().startswith(word)


def test_a_qemu_is_not_asked(tmp_path: Path) -> None:
    """One that waits at the same address would take the question for a migration, and end."""
    with socket.create_server(("127.0.0.1", 0)) as listener, hosts(guest()) as (here,):
        last = lambda connection: connection.sendall(shut(1).encode())  # noqa: E731
        thread = threading.Thread(target=qemu_double, args=(listener, last, True), daemon=True)
        thread.start()
        uri = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        info = here.migrate(uri)
        thread.join(30)
        in_doubt(here, info)
        assert "look there (QMP: query-status)" in info.error
        assert "resolve_doubt" not in info.error
        with pytest.raises(InDoubt, match="look there"):
            here.controller.resolve_doubt()
        assert not select.select([listener], [], [], 0)[0], "somebody has connected"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(here.controller.resolve_doubt, uri)  # on its user's word
            connection, _ = listener.accept()
            connection.close()
            listener.close()
            with pytest.raises(InDoubt):
                asked.result()


@dataclass
class QemuSource:
    """What a QEMU with return-path sends, and the end of it that waits for SHUT."""

    connection: socket.socket

    def said(self) -> bytes:
        """What has come back so far, without the destination's end."""
        self.connection.settimeout(60)
        return self.connection.recv(100)

    def await_word(self) -> None:
        """Something has come back; it is not read."""
        assert select.select([self.connection], [], [], 60)[0]

    def reset(self) -> None:
        """The connection breaks; the other end knows when this returns."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@contextmanager
def qemu_source(there: Host, folder: Path, uri: str = TCP) -> Iterator[QemuSource]:
    """All of a stream has been sent, and the connection is open."""
    with hosts(guest()) as (here,):
        assert here.migrate(f"file:{folder}/stream").status is COMPLETED
    stream = (folder / "stream").read_bytes()
    head = sections.header(sections.Configuration("double-1.0", 12))
    assert stream.startswith(head)
    with connect(there.controller.incoming(uri)) as connection:
        connection.sendall(head + sections.command(Command.OPEN_RETURN_PATH) + stream[len(head) :])
        yield QemuSource(connection)


def test_a_qemu_gives_its_guest_up_before_that_runs_here(tmp_path: Path) -> None:
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        resume, may_start, heard = there.guest.resume, threading.Event(), []

        def start() -> int:
            assert may_start.wait(60)
            return resume()

        there.guest.resume = start  # type: ignore[method-assign]
        with qemu_source(there, tmp_path) as source:
            heard.append(source.said())
            assert not there.guest.running
            may_start.set()
            there.wait_status(COMPLETED)
        assert heard == [shut(0).encode()]
        assert there.guest.running
        assert there.guest.ownership.state is OwnershipState.OWNER


@pytest.mark.parametrize("reset", [True, False])
def test_a_qemu_that_is_not_told_keeps_its_guest(tmp_path: Path, reset: bool) -> None:
    """It has sent all of the guest, and the connection breaks before it is told that the guest runs here: it goes on with it."""
    with hosts(guest(), DoubleGuest(PAGES, running=False)) as (here, there):
        load, loading, may_load = there.guest.load_devices, threading.Event(), threading.Event()

        def wait(*arguments: Any) -> None:
            loading.set()
            assert may_load.wait(60)
            load(*arguments)

        there.guest.load_devices = wait  # type: ignore[method-assign]
        with qemu_source(there, tmp_path) as source:
            assert loading.wait(60)
            if reset:
                source.reset()
            else:
                source.connection.close()
            may_load.set()
            there.wait_status(FAILED)
        assert not there.guest.running
        assert there.guest.ownership.state is OwnershipState.ABSENT
        assert not there.controller.info().in_doubt
        assert here.migrate(there.controller.info().socket_address).status is COMPLETED


def test_a_guest_whose_qemu_may_go_on_with_it_waits_for_its_user(tmp_path: Path) -> None:
    """The connection breaks when SHUT is on its way: on this host it is known that nobody has read it, elsewhere it is not."""
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        with qemu_source(there, tmp_path, f"unix:{tmp_path}/there") as source:
            source.await_word()
            source.connection.close()
        there.wait_status(FAILED)
        info = there.controller.info()
        assert info.in_doubt
        assert "was told that the guest runs here: it stays paused. Look there" in info.error
        assert there.guest.left_in_doubt
        assert there.guest.ownership.apply(Event.CONT) is OwnershipState.ARRIVED
        with pytest.raises(NotTheOwner, match="may still run at the QEMU that it came from"):
            there.guest.resume()
        with pytest.raises(StateError, match="has been started already"):
            there.controller.incoming(TCP)
        with pytest.raises(NotTheOwner, match="may still run at the QEMU"):
            there.controller.migrate(ANYWHERE)
        there.guest.ownership.apply(Event.FORCED_CONT)
        there.guest.resume()
        there.guest.step_until(there.guest.steps + 1)
        there.guest.check_ram()
        assert not there.controller.info().in_doubt
        assert there.migrate("exec:cat > /dev/null").status is COMPLETED


def test_a_guest_that_a_qemu_has_given_up_stays_here_when_it_cannot_be_started(tmp_path: Path) -> None:
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        there.guest.fail["resume"] = OSError("no tap")
        with qemu_source(there, tmp_path) as source:
            assert source.said() == shut(0).encode()
            there.wait_status(FAILED)
        info = there.controller.info()
        assert info.error == "the guest is here, and cannot be started: no tap; 'cont' tries again"
        assert not info.in_doubt
        assert there.guest.left_in_doubt
        del there.guest.fail["resume"]
        there.guest.resume()
        there.guest.step_until(there.guest.steps + 1)
        there.guest.check_ram()


# -- one way -------------------------------------------------------------------------------------------------


def test_a_guest_that_was_saved_goes_on_here(tmp_path: Path) -> None:
    with hosts(guest()) as (here,):
        info = here.migrate(f"file:{tmp_path / 'saved'}")
        assert info.status is COMPLETED, info.error
        assert here.guest.ownership.state is OwnershipState.SAVED
        with pytest.raises(StateError, match="'cont' first"):
            here.controller.migrate(f"file:{tmp_path / 'saved'}")
        here.guest.ownership.apply(Event.CONT)
        here.guest.resume()
        assert here.guest.running
        assert here.migrate(f"file:{tmp_path / 'again'}").status is COMPLETED


@pytest.mark.parametrize(
    ("command", "state"),
    [
        ("exit 3", OwnershipState.OWNER),
        ("head -c 10 > /dev/null", OwnershipState.OWNER),
        ("cat > /dev/null", OwnershipState.HANDED_ON),
        ("cat > /dev/null; exit 3", OwnershipState.IN_DOUBT),
        ("cat > /dev/null; kill -9 $$", OwnershipState.IN_DOUBT),
    ],
)
def test_a_command_may_be_a_hand_over(command: str, state: OwnershipState) -> None:
    with hosts(guest()) as (here,):
        info = here.migrate(f"exec:{command}")
        assert here.guest.ownership.state is state, info.error
        assert info.in_doubt is (state is OwnershipState.IN_DOUBT)
        assert here.guest.running is (state is OwnershipState.OWNER)
        assert (info.status is COMPLETED) is (state is OwnershipState.HANDED_ON)
        if state is not OwnershipState.OWNER:
            assert here.guest.ownership.apply(Event.CONT) is state, "only by an explicit word"
            assert here.guest.ownership.apply(Event.FORCED_CONT) is OwnershipState.OWNER


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("automatic", [True, False])
def test_a_command_that_ends_late_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, automatic: bool, status: int
) -> None:
    monkeypatch.chdir(tmp_path)  # a long command is not told whole
    fifo, full = Path("fifo"), Path("full")
    os.mkfifo(fifo)
    os.mkfifo(full)
    with hosts(guest()) as (here,):
        here.controller.set_parameters({"x-sterna-doubt-timeout": 60_000 if automatic else 200})
        here.controller.migrate(f"exec:cat > /dev/null; echo > full; read line < fifo; exit {status}")
        full.read_text()
        if not automatic:
            here.expire()
            info = here.outcome()
            in_doubt(here, info)
            assert "has not ended, after it was given all of the guest" in info.error
            assert info.error.endswith("'resolve_doubt' looks whether the command has ended since")
        fifo.write_text("go on\n")
        if automatic:
            info = here.outcome()
            assert info.in_doubt is bool(status), info.error
            assert (info.status is COMPLETED) is not bool(status)
        elif status:
            with pytest.raises(InDoubt, match="exited with 3, after it was given all"):
                here.controller.resolve_doubt()
        else:
            assert here.controller.resolve_doubt() == "the command has all of the guest, and may run it"
            assert here.guest.away
        state = OwnershipState.IN_DOUBT if status else OwnershipState.HANDED_ON
        assert here.guest.ownership.state is state
        for thread in threading.enumerate():
            if thread.name == "exec-exit":
                thread.join(30)
