"""The wait for a guest: what its listener survives, and whom it turns away."""

import os
import re
import resource
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from tests.migration.pairs import TCP, Host, hosts, source_guest, waiting_guest
from tests.ports import held_port
from tests.refusal import refuse_threads

from sterna.migration import handshake, outcome_query, verify
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.controller import MigrationController
from sterna.migration.destination import listen
from sterna.migration.destination.context import DestinationContext, Wait
from sterna.migration.destination.multifd.pending import PendingChannels
from sterna.migration.destination.run import Destination
from sterna.migration.errors import ChannelError, StateError
from sterna.migration.parameters import Parameters
from sterna.migration.peer import Peer
from sterna.migration.progress import Progress
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import Event
from sterna.stream import sections
from sterna.stream.multifd.format import NO_UUID, Init
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.stream.return_path import ReturnPathDecoder
from sterna.stream.wire import Command
from sterna.testing.guest import DoubleGuest

COMPLETED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.FAILED
PAGES = 3


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """This process can open nothing more: EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    # The lowest free number is now beyond the limit; what is open stays open.
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Counts the pauses that threads make."""
    made = threading.Semaphore(0)
    original = Cancellation.sleep

    def sleep(self: Cancellation, seconds: float) -> None:
        made.release()
        original(self, min(seconds, 0.01))

    monkeypatch.setattr(Cancellation, "sleep", sleep)
    return made


def ask(connection: socket.socket) -> bytes:
    connection.sendall(outcome_query.QUESTION + bytes(outcome_query.ID_BYTES))
    return connection.recv(8)


def test_a_listener_without_a_free_descriptor_goes_on_when_there_is_one(pauses: threading.Semaphore) -> None:
    with (
        hosts(waiting_guest()) as (there,),
        socket.socket() as connection,
    ):
        port = int(there.controller.incoming(TCP).rpartition(":")[2])
        with no_descriptors_left():
            connection.connect(("127.0.0.1", port))
            assert pauses.acquire(timeout=600)
            assert pauses.acquire(timeout=600), "it waits again for as long as it has to"
        connection.settimeout(300)
        assert ask(connection) == b"STRNANS1"
        assert there.controller.info().status is MigrationStatus.SETUP


def test_a_listener_that_fails_stays_until_the_source_has_confirmed(
    pauses: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Peer, "confirm", lambda self: None)
    with (
        held_port() as port,
        hosts(DoubleGuest(PAGES, steps_per_ms=0), waiting_guest(PAGES)) as (here, there),
    ):
        # A socket that asked for its port itself keeps it when it is shut down.
        uri = uris.parse(there.controller.incoming(f"tcp:127.0.0.1:{port}"))
        assert isinstance(uri, uris.ListeningUri)
        wait = there.controller._incoming
        assert wait is not None
        assert wait._listener is not None
        sock = wait._listener._socket
        original = there.guest.resume

        def resume() -> int:
            # COMMIT has arrived. A socket that was shut down accepts nothing: EINVAL.
            sock.shutdown(socket.SHUT_RDWR)
            assert pauses.acquire(timeout=600), "the listener was given up"
            sock.listen(16)
            return original()

        there.guest.resume = resume  # type: ignore[method-assign]
        info = here.migrate(str(uri))
        assert info.status is COMPLETED, info.error
        with Cancellation() as cancellation:
            event, _ = outcome_query.ask(
                uri, uuid.UUID(info.migration_id).bytes, 10, cancellation, lambda event: event is Event.RUNS
            )
        assert event is Event.RUNS


def test_a_listener_that_fails_before_any_guest_came_is_given_up() -> None:
    with hosts(waiting_guest(PAGES)) as (there,):
        there.controller.incoming(TCP)
        wait = there.controller._incoming
        assert wait is not None
        assert wait._listener is not None
        wait._listener._socket.shutdown(socket.SHUT_RDWR)
        info = there.outcome()
        assert info.status is FAILED
        assert info.error.endswith("invalid argument")


@pytest.mark.parametrize("kind", ["tcp", "unix", "file"])
def test_a_wait_that_has_no_thread_keeps_no_address(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_port() as port, hosts(waiting_guest(PAGES)) as (there,):
        uri = {"tcp": f"tcp:127.0.0.1:{port}"}.get(kind, f"{kind}:{tmp_path}/there")
        if kind == "file":
            (tmp_path / "there").touch()
        refuse_threads(monkeypatch, "incoming", times=1)
        with pytest.raises(ChannelError, match="cannot be waited at: can't start new thread"):
            there.controller.incoming(uri)
        assert there.controller.incoming(uri) == uri


def opening(verified: bool) -> bytes:
    """What a sterna sends up to its OFFER."""
    greeting = handshake.GREETING.to_bytes(4, "big")
    offer = handshake.encode(handshake.Offer(uuid.uuid4().hex, verified))
    return (
        sections.header(sections.Configuration("double-1.0", 12))
        + sections.command(Command.OPEN_RETURN_PATH)
        + sections.command(Command.PING, greeting)
        + sections.command(handshake.PrivateCommand.OFFER, offer)
    )


def nack_of(connection: socket.socket) -> handshake.Nack:
    """The first refusal that comes back."""
    decoder = ReturnPathDecoder()
    while data := connection.recv(4096):
        for message in decoder.feed(data):
            if message.type == handshake.PrivateMessage.NACK:
                return handshake.decode(message.payload, handshake.Nack)
    raise AssertionError("closed without a refusal")


@pytest.mark.parametrize(
    ("offered", "text"), [(False, "which the source did not offer"), (True, "digests of 1024 RAM blocks")]
)
def test_digests_that_do_not_fit_are_refused_at_once(offered: bool, text: str) -> None:
    with hosts(waiting_guest(PAGES)) as (there,):
        port = int(there.controller.incoming(TCP).rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 30) as connection:
            connection.sendall(opening(verified=offered))
            connection.sendall(sections.section_full(2, verify.SECTION.name, 0, 1))
            connection.sendall(bytes(16) + (1024).to_bytes(4, "big"))
            assert text in nack_of(connection).reason
        there.wait_status(FAILED)


def fail_when_completed(name: str, data: dict[str, object]) -> None:
    if data.get("status") == "completed":
        raise RuntimeError("the listener is out")


def assert_guest_lives(guest: DoubleGuest, steps: int) -> None:
    assert guest.running
    assert guest.steps == steps
    guest.check_ram()


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_a_listener_to_events_that_fails_harms_no_guest(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guest = DoubleGuest(PAGES, steps_per_ms=0)
    guest.advance_steps(5)
    with hosts(guest) as (here,), DoubleGuest(PAGES, running=False, steps_per_ms=0) as moved:
        with MigrationController(moved, observe=fail_when_completed) as controller:
            uri = f"file:{tmp_path}/stream"
            if kind == "tcp":
                uri = controller.incoming(TCP)
            assert here.migrate(uri).status is COMPLETED
            if kind == "file":
                controller.incoming(uri)
            assert controller.wait(300).status is COMPLETED
        assert_guest_lives(moved, 5)
    assert "the listener is out" in caplog.text


class FailsAtTheEnd(Progress):
    """An account that cannot be closed."""

    def enter(self, status: MigrationStatus, **changes: object) -> None:
        if status is COMPLETED:
            raise RuntimeError("the ink has run out")
        super().enter(status, **changes)


def test_whatever_fails_after_the_start_the_guest_keeps_its_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guest = DoubleGuest(PAGES, steps_per_ms=0)
    guest.advance_steps(5)
    with hosts(guest) as (here,):
        assert here.migrate(f"file:{tmp_path}/stream").status is COMPLETED
    with DoubleGuest(PAGES, running=False, steps_per_ms=0) as moved, Cancellation() as cancellation:
        progress = FailsAtTheEnd(lambda name, data: None, "", incoming=True)
        progress.enter(MigrationStatus.SETUP)
        with uris.parse(f"file:{tmp_path}/stream").open_incoming(cancellation) as channel:
            wait = Wait(moved, Parameters(), outcome_query.OutcomeRecord(), uuid.uuid4(), cancellation)
            Destination(DestinationContext(wait, channel, b"", progress)).run()
        assert progress.snapshot().status is MigrationStatus.ACTIVE, "no failure is told of a guest that runs"
        assert_guest_lives(moved, 5)
    assert "the ink has run out" in caplog.text


def be_patient(there: Host) -> None:
    """Whoever comes next is waited for, as long as a busy machine may take."""
    incoming = there.controller._incoming
    assert incoming is not None
    incoming._wait = replace(incoming._wait, silence_seconds=None)


def test_a_source_that_falls_silent_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "SILENCE_SECONDS", 0.2)
    with hosts(DoubleGuest(PAGES, steps_per_ms=0), waiting_guest(PAGES)) as (here, there):
        address = there.controller.incoming(TCP)
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 30) as connection:
            connection.sendall(opening(verified=False))
            size = len(opening(verified=False))
            assert f"sent only {size} bytes in 0.2 s" in nack_of(connection).reason
            there.wait_status(FAILED)
            be_patient(there)
            assert here.migrate(address).status is COMPLETED


def test_a_source_that_drips_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never silent for long, and never gets anywhere."""
    monkeypatch.setattr(listen, "SILENCE_SECONDS", 0.5)
    setup = sections.section_start(1, "ram", 0, 4) + ram_setup([("double.ram", PAGES * 4096)])
    part = sections.section_part(1) + END_OF_RECORDS + sections.footer(1)
    with hosts(DoubleGuest(PAGES, steps_per_ms=0), waiting_guest(PAGES)) as (here, there):
        address = there.controller.incoming(TCP)
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 30) as connection:
            connection.sendall(opening(verified=False) + setup + sections.footer(1))
            connection.settimeout(0.02)
            with suppress(OSError):  # in the end it is reset
                for _ in range(3000):
                    connection.sendall(part)
                    with suppress(TimeoutError):
                        connection.recv(1 << 16)
            there.wait_status(FAILED)
            assert re.search(r"sent only \d+ bytes in 0\.5 s", there.controller.info().error)
            be_patient(there)
            assert here.migrate(address).status is COMPLETED


def test_a_source_that_is_only_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, pages = 3.0, 15
    monkeypatch.setattr(listen, "SILENCE_SECONDS", seconds)
    guest = DoubleGuest(pages, steps_per_ms=0)
    guest.advance_steps(3 * pages)
    with hosts(guest, waiting_guest(pages)) as (here, there):
        # A page takes a tenth of the time, so that the machine may hold it up; all of them more than all of it.
        here.controller.set_parameters({"max-bandwidth": round(10 * 4096 / seconds)})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is COMPLETED, info.error
        assert info.total_time_ms > 1000 * seconds


def test_a_sterna_that_is_turned_away_learns_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_SLOT_SECONDS", 0.1)
    monkeypatch.setattr(listen, "_GREETING_SECONDS", 300.0)
    with hosts(DoubleGuest(PAGES), waiting_guest(PAGES)) as (here, there):
        address = there.controller.incoming(TCP)
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 30) as first:
            first.sendall(opening(verified=False))
            there.wait_status(MigrationStatus.ACTIVE)
            info = here.migrate(address)
            assert info.error == "destination refused: busy: another guest is coming in here"
            assert here.guest.running
            monkeypatch.setattr(listen, "_GREETING_SECONDS", 0.0)  # over before anything of it is read
            with socket.create_connection(("127.0.0.1", port), 30) as other:
                other.sendall(sections.header(sections.Configuration("double-1.0", 12)))
                assert other.recv(100) == b"", "who does not greet is left without a word"
        there.wait_status(FAILED)


def test_a_second_guest_is_turned_away_while_the_first_is_not_confirmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Peer, "confirm", lambda self: None)
    with hosts(DoubleGuest(PAGES), DoubleGuest(PAGES), waiting_guest(PAGES)) as (one, other, there):
        address = there.controller.incoming(TCP)
        assert one.migrate(address).status is COMPLETED
        info = other.migrate(address)
        assert info.error == "destination refused: busy: a guest that came in runs here already"
        assert other.guest.running


def test_a_second_stream_is_turned_away_whatever_fails_after_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pages would be written into the guest that runs, and whatever failed then would take all of its RAM away."""

    shut = PendingChannels.shut

    def fail(pending_channels: PendingChannels) -> None:
        monkeypatch.setattr(PendingChannels, "shut", shut)
        raise OSError("the door is jammed")

    monkeypatch.setattr(Peer, "confirm", lambda self: None)
    one, two = (DoubleGuest(PAGES, steps_per_ms=0) for _ in range(2))
    one.advance_steps(5)
    with hosts(one, two, DoubleGuest(PAGES, running=False, steps_per_ms=0)) as (here, other, there):
        address = there.controller.incoming(TCP)
        monkeypatch.setattr(PendingChannels, "shut", fail)
        assert here.migrate(address).status is COMPLETED
        there.wait_status(COMPLETED)
        info = other.migrate(address)
        assert info.error == "destination refused: busy: a guest that came in runs here already"
        assert_guest_lives(there.guest, 5)
        assert "the door is jammed" in caplog.text


def test_a_guest_that_is_here_is_not_waited_for(tmp_path: Path) -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        for uri in ("defer", TCP, f"file:{tmp_path}/none"):
            with pytest.raises(StateError, match="this machine has a guest already"):
                here.controller.incoming(uri)
        assert here.migrate(there.controller.incoming(TCP)).status is COMPLETED
        with pytest.raises(StateError, match="this machine has a guest already"):
            here.controller.incoming(TCP)


@pytest.mark.parametrize("said", [b"", b"QEV", bytes(Init(NO_UUID, 0).encode()[:40]), outcome_query.QUESTION])
def test_connections_that_do_not_say_what_they_want_make_room(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there may be, and none of them goes by itself."""
    monkeypatch.setattr(listen, "_HEAD_SECONDS", 600.0)
    monkeypatch.setattr(listen, "_ROOM_SECONDS", 5.0)
    with hosts(source_guest(), waiting_guest()) as (here, there), ExitStack() as stack:
        uri = there.controller.incoming(TCP)
        address = ("127.0.0.1", int(uri.rpartition(":")[2]))
        silent = []
        for _ in range(listen._CONNECTION_LIMIT):
            silent.append(stack.enter_context(socket.create_connection(address, 300)))
            silent[-1].sendall(said)
        info = here.migrate(uri)
        assert info.status is COMPLETED, info.error
        assert not silent[0].recv(1), "the oldest has made room"
