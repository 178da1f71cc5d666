"""The proxy between two ends: every byte goes through, whoever dies, and what went through is understood."""

import contextlib
import errno
import os
import random
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis.test_survey import HEADER, ram_stream, records
from tests.migration.pairs import TCP, assert_one_runs, hosts, source_guest, waiting_guest
from tests.migration.proxy import Fault
from tests.migration.proxy import Proxy as CuttingProxy
from tests.ports import held_port
from tests.refusal import Refusal, refuse_threads, refusing

from sterna.analysis.capture import survey_file
from sterna.analysis.proxy import connection as connection_module
from sterna.analysis.proxy import proxy as proxy_module
from sterna.analysis.proxy.connection import Connection, ConnectionKind, End
from sterna.analysis.proxy.outcome import ProxyOutcome
from sterna.analysis.proxy.proxy import Proxy
from sterna.analysis.proxy.recording import Recording, RecordingError
from sterna.analysis.proxy.tee import HEAD_BYTES, PATIENCE_SECONDS, LeftBehind, Tee
from sterna.analysis.proxy.view import ProxyView
from sterna.analysis.survey import Surveyor
from sterna.host.newfile import NewFile
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.channels.tcp import TcpUri
from sterna.migration.channels.tcp import parse as parse_tcp
from sterna.migration.channels.unix import UnixUri
from sterna.migration.statistics import MigrationStatus
from sterna.stream import sections
from sterna.stream.multifd.format import Init
from sterna.stream.return_path import shut
from sterna.stream.wire import Command
from sterna.testing.guest import DoubleGuest

COMPLETED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.FAILED
SECONDS = 300
# What `source_guest` has written takes four seconds, and is sent as it is.
WHOLE_PAGES = {"max-bandwidth": 200_000, "x-sterna-policy": "fixed"}


class Running:
    """A proxy in a thread of its own."""

    def __init__(self, destination: str, **options: object) -> None:
        listen = TcpUri("127.0.0.1", 0)
        self.proxy = Proxy(listen, parse_tcp(destination.removeprefix("tcp:")), **options)  # type: ignore[arg-type]
        self.uri = self.proxy.uri
        self.port = int(self.uri.rpartition(":")[2])
        self._result: list[ProxyView] = []
        self._watched = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._result.append(self.proxy.run(self._watch, 0.01))

    def _watch(self, proxy: Proxy) -> None:
        with self._watched:
            self._watched.notify_all()

    def wait_until(self, condition) -> None:
        """Wait for a state of the proxy, looking at it again and again."""
        with self._watched:
            assert self._watched.wait_for(lambda: condition(self.proxy.view()), SECONDS), self.proxy.view()

    def result(self) -> ProxyView:
        """Wait for its end."""
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), self.proxy.view()
        return self._result[0]

    def close(self) -> None:
        self.proxy.interrupt()
        self.proxy.interrupt()
        self._thread.join(SECONDS)
        self.proxy.close()


@contextmanager
def through(destination: str, **options: object) -> Iterator[Running]:
    running = Running(destination, **options)
    try:
        yield running
    finally:
        running.close()


# -- migrations -----------------------------------------------------------------------------------------------


def test_a_migration_between_two_sternas(tmp_path: Path) -> None:
    with hosts(source_guest(512), waiting_guest(512)) as (here, there):
        address = there.controller.incoming(TCP)
        with through(address, record=tmp_path / "record") as running:
            info = here.migrate(running.uri)
            assert info.status is COMPLETED, info.error
            view = running.result()
        assert_one_runs(here.guest, there.guest)
    assert view.verdict.outcome is ProxyOutcome.COMPLETED
    survey = view.survey
    assert survey is not None
    assert survey.flaw() is None
    assert survey.digest is not None
    assert info.verified
    assert survey.digest.hex == info.ram_digest_source == info.ram_digest_destination
    assert {command.name for command in survey.commands} >= {"PING", "0x5301", "0x5302", "0x5303"}
    assert view.answers.counts.keys() >= {"HELLO", "READY", "RUNNING"}
    [main] = view.connections
    assert (main.kind, main.forwarded) == (ConnectionKind.MAIN, survey.bytes)
    assert len(survey.passes) == len(view.pass_starts) >= 1
    assert 0 <= view.pass_starts[0] <= view.pass_starts[-1] <= view.seconds
    assert view.confirmed_seconds is not None
    recorded = survey_file(tmp_path / "record", digests=True)
    assert recorded == survey
    assert recorded.digest is not None
    assert recorded.digest.hex == survey.digest.hex
    assert (tmp_path / "record" / "main.return").stat().st_size == main.returned
    assert {path.name for path in (tmp_path / "record").iterdir()} == {"main.stream", "main.return"}


@pytest.mark.parametrize(
    "capabilities", [{"xbzrle": True}, {"multifd": True}, {"multifd": True, "xbzrle": True}]
)
def test_migrations_with_other_encodings(capabilities: dict[str, bool], tmp_path: Path) -> None:
    with hosts(source_guest(700, steps_per_harvest=350), waiting_guest(700)) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities(capabilities)
            host.controller.set_parameters({"multifd-channels": 3})
        here.controller.set_parameters({"max-bandwidth": 4 << 20, "downtime-limit": 0})
        address = there.controller.incoming(TCP)
        with through(address, record=tmp_path / "record") as running:
            here.controller.migrate(running.uri)
            here.wait_pass(4)
            here.controller.set_parameters({"max-bandwidth": 0, "downtime-limit": 1000})
            info = here.outcome()
            assert info.status is COMPLETED, info.error
            view = running.result()
        assert_one_runs(here.guest, there.guest)
    survey = view.survey
    assert view.verdict.outcome is ProxyOutcome.COMPLETED
    assert survey is not None
    assert survey.flaw() is None, survey.flaw()
    assert survey.digest is not None
    assert survey.digest.hex == info.ram_digest_destination
    assert len(survey.passes) >= 2
    if "multifd" in capabilities:
        assert [one.id for one in survey.channels] == [0, 1, 2]
        assert len(view.connections) == 4
        assert (sum(one.pages for one in survey.channels) > 0) == (survey.kinds.channel_pages > 0)
        assert survey.total_bytes == view.forwarded
    if "xbzrle" in capabilities:
        assert survey.kinds.changes > 0
    recorded = survey_file(tmp_path / "record", digests=True)
    assert recorded.flaw() is None
    assert recorded.digest is not None
    assert recorded.digest.hex == survey.digest.hex
    assert recorded.total_bytes == survey.total_bytes


def test_interrupted(tmp_path: Path) -> None:
    with hosts(source_guest(512), waiting_guest(512)) as (here, there):
        here.controller.set_parameters(WHOLE_PAGES)
        with through(there.controller.incoming(TCP), record=tmp_path / "record") as running:
            here.controller.migrate(running.uri)
            running.wait_until(lambda view: view.forwarded > 100_000)
            running.proxy.interrupt()
            view = running.result()
            assert here.outcome().status is FAILED
        assert view.verdict.outcome is ProxyOutcome.CANCELLED
        assert view.survey is not None
        assert view.survey.fault is not None
        assert view.survey.fault.cut
        assert (
            view.survey.fault.offset == view.forwarded == (tmp_path / "record" / "main.stream").stat().st_size
        )
        assert assert_one_runs(here.guest, there.guest) is here.guest


def test_cancelled_at_the_source() -> None:
    with hosts(source_guest(512), waiting_guest(512)) as (here, there):
        here.controller.set_parameters(WHOLE_PAGES)
        with through(there.controller.incoming(TCP)) as running:
            here.controller.migrate(running.uri)
            running.wait_until(lambda view: view.forwarded > 100_000)
            here.controller.cancel()
            assert here.outcome().status is MigrationStatus.CANCELLED
            view = running.result()
        assert view.verdict.outcome is ProxyOutcome.FAILED
        assert "within the stream" in view.verdict.reason
        assert assert_one_runs(here.guest, there.guest) is here.guest


def test_what_the_source_does_upon_an_answer_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that goes as soon as it has been refused did not go before."""
    with closing(Cancellation()) as cancellation, ExitStack() as stack:
        near, source = (stack.enter_context(end) for end in socket.socketpair())
        far, destination = (stack.enter_context(end) for end in socket.socketpair())
        there = SocketChannel(cancellation, "source", near)
        connection = Connection(there, SocketChannel(cancellation, "destination", far), lambda one: None)
        gone = threading.Event()
        note_end, send = connection._note_end, there.send

        def note(name: str, end: End) -> None:
            note_end(name, end)
            gone.set()

        def send_and_be_left(data: memoryview) -> None:
            send(data)
            source.close()
            assert gone.wait(SECONDS)

        monkeypatch.setattr(connection, "_note_end", note)
        monkeypatch.setattr(there, "send", send_and_be_left)
        destination.sendall(shut(1).encode())
        destination.shutdown(socket.SHUT_WR)
        connection.run()
    assert connection.answers.shut == 1
    assert connection.answers.decided_ns <= connection.forward_ended_ns


def test_refused_by_the_destination() -> None:
    with hosts(source_guest(64), waiting_guest(32)) as (here, there):
        with through(there.controller.incoming(TCP)) as running:
            info = here.migrate(running.uri)
            view = running.result()
        assert info.status is FAILED
        assert "double.ram" in info.error
        assert view.verdict.outcome is ProxyOutcome.FAILED
        assert "the destination refused: " in view.verdict.reason
        assert "double.ram" in view.verdict.reason
        assert view.answers.counts["HELLO"]


def test_nobody_at_the_destination() -> None:
    with held_port() as port, hosts(source_guest(16)) as (here,), through(f"tcp:127.0.0.1:{port}") as running:
        assert here.migrate(running.uri).status is FAILED
        view = running.result()
    assert view.verdict.outcome is ProxyOutcome.UNREACHABLE
    assert "nobody listens there" in view.verdict.reason


def still_guest(**options: bool) -> DoubleGuest:
    guest = DoubleGuest(3, steps_per_ms=0, **options)  # type: ignore[arg-type]
    if guest.running:
        guest.advance_steps(1)
    return guest


def test_the_source_can_ask_when_the_answer_was_lost() -> None:
    """Cut between the proxy and the destination, at each step of what comes back."""
    outcomes = set()
    with hosts(still_guest(), still_guest(running=False)) as (here, there):
        address = there.controller.incoming(TCP)
        with through(address) as running:
            assert here.migrate(running.uri).status is COMPLETED
            total = running.result().connections[0].returned
    for backward in [*range(total - 60, total, 5), total]:
        with hosts(still_guest(), still_guest(running=False)) as (here, there):
            here.controller.set_parameters({"x-sterna-doubt-timeout": 20_000})
            port = int(there.controller.incoming(TCP).rpartition(":")[2])
            with CuttingProxy(port, Fault(backward=backward)) as cutting, through(cutting.uri) as running:
                info = here.migrate(running.uri)
                view = running.result()
            there.controller.wait(SECONDS)
            assert not info.in_doubt, (backward, info)
            owner, other = (there, here) if info.status is COMPLETED else (here, there)
            assert (owner.guest.running, other.guest.running) == (True, False), (backward, info, view.verdict)
            asked = len(view.connections) > 1
            outcomes.add((info.status, view.verdict.outcome, asked))
    assert outcomes >= {(COMPLETED, ProxyOutcome.COMPLETED, True), (COMPLETED, ProxyOutcome.COMPLETED, False)}
    assert {(status, outcome) for status, outcome, _ in outcomes} <= {
        (COMPLETED, ProxyOutcome.COMPLETED),
        (FAILED, ProxyOutcome.FAILED),
    }


def test_a_destination_that_is_gone_leaves_source_and_proxy_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "DOUBT_SECONDS", 1.0)
    with hosts(still_guest(), still_guest(running=False)) as (here, there):
        here.controller.set_parameters({"x-sterna-doubt-timeout": 500})
        port = int(there.controller.incoming(TCP).rpartition(":")[2])
        with socket.create_server(("127.0.0.1", 0)) as server:
            # Takes the stream, passes it on to the destination, and dies before it can say that it runs.
            last = threading.Thread(target=die_before_the_end, args=(server, port), daemon=True)
            last.start()
            with through(f"tcp:127.0.0.1:{server.getsockname()[1]}") as running:
                info = here.migrate(running.uri)
                view = running.result()
        assert (info.status, info.in_doubt) == (FAILED, True)
        assert not here.guest.running
    assert view.verdict.outcome is ProxyOutcome.IN_DOUBT


def die_before_the_end(server: socket.socket, port: int) -> None:
    near, _ = server.accept()
    with near, socket.create_connection(("127.0.0.1", port)) as far:
        back = threading.Thread(target=copy, args=(far, near), daemon=True)
        back.start()
        seen = b""
        while b"\x08\x53\x02" not in seen:  # COMMIT
            data = near.recv(1 << 16)
            seen = seen[-2:] + data
            if b"\x08\x53\x02" not in seen:
                far.sendall(data)
        server.close()
        far.shutdown(socket.SHUT_RDWR)
        back.join()


def copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass


# -- bytes ----------------------------------------------------------------------------------------------------


def receive(sock: socket.socket) -> bytes:
    out = b""
    while data := sock.recv(1 << 16):
        out += data
    return out


@pytest.mark.parametrize("opening", [b"QEVM", b"\x16\x03\x01\x02", b"", b"\x11\x22\x33\x44"])
def test_not_a_byte_is_changed(opening: bytes, tmp_path: Path) -> None:
    """Also of what is no migration; and each direction ends for itself."""
    there_and_back = [opening + random.Random(i).randbytes(3_000_000) for i in (1, 2)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with through(f"tcp:127.0.0.1:{port}", record=tmp_path) as running:
            with socket.create_connection(("127.0.0.1", running.port)) as near:
                near.sendall(there_and_back[0][:1])
                far, _ = server.accept()
                with far:
                    writing = threading.Thread(
                        target=lambda: (near.sendall(there_and_back[0][1:]), near.shutdown(socket.SHUT_WR))
                    )
                    writing.start()
                    assert receive(far) == there_and_back[0]
                    writing.join()
                    answering = threading.Thread(
                        target=lambda: (far.sendall(there_and_back[1]), far.shutdown(socket.SHUT_WR))
                    )
                    answering.start()
                    assert receive(near) == there_and_back[1]
                    answering.join()
            if opening == b"QEVM":
                view = running.result()
                assert view.verdict.outcome is ProxyOutcome.UNKNOWN
                assert "version" in view.verdict.reason
            else:
                running.wait_until(lambda view: view.connections[0].returned == 3_000_000 + len(opening))
                running.proxy.interrupt()
                assert running.result().verdict.outcome is ProxyOutcome.NOTHING
    names = {b"QEVM": "main", b"\x11\x22\x33\x44": "channel-0"}
    stem = names.get(opening, "other-0")
    assert (tmp_path / f"{stem}.stream").read_bytes() == there_and_back[0]
    assert (tmp_path / f"{stem}.return").read_bytes() == there_and_back[1]


@pytest.mark.parametrize("victim", ["near", "far"])
@pytest.mark.parametrize("reset", [False, True])
def test_an_end_that_dies(victim: str, reset: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with through(f"tcp:127.0.0.1:{server.getsockname()[1]}") as running:
            near = socket.create_connection(("127.0.0.1", running.port))
            near.sendall(b"QEVM\0\0\0\3")
            far, _ = server.accept()
            ends = {"near": near, "far": far}
            dying = ends.pop(victim)
            [survivor] = ends.values()
            far.recv(4)
            if reset:
                dying.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            dying.close()
            survivor.settimeout(SECONDS)
            try:
                assert receive(survivor) in (b"\0\0\0\3", b"")
            except ConnectionResetError:
                pass
            survivor.close()
            view = running.result()
        assert view.forwarded == 8
        assert view.verdict.outcome is ProxyOutcome.FAILED
        assert {"near": "source", "far": "destination"}[victim] in view.verdict.reason
        assert "within the stream" in view.verdict.reason


def test_a_peer_that_only_looks_does_not_count() -> None:
    with (
        hosts(source_guest(16), waiting_guest(16)) as (here, there),
        through(there.controller.incoming(TCP)) as running,
    ):
        socket.create_connection(("127.0.0.1", running.port)).close()
        assert here.migrate(running.uri).status is COMPLETED
        assert running.result().verdict.outcome is ProxyOutcome.COMPLETED


# -- others who connect ---------------------------------------------------------------------------------------


@contextmanager
def answering(reply: bytes = b"no") -> Iterator[str]:
    """Somebody who takes every connection and, once it ends, says something and ends it too."""

    def serve(sock: socket.socket) -> None:
        with sock:
            try:
                receive(sock)
                sock.sendall(reply)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            serving.append(threading.Thread(target=serve, args=(sock,), daemon=True))
            serving[-1].start()

    serving: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"tcp:127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for one in serving:
            one.join()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_others_that_have_ended_cost_nothing_and_are_told_together(tmp_path: Path) -> None:
    count, size = 80, 300_000
    with answering() as address, through(address, record=tmp_path) as running:

        def connect() -> None:
            with socket.create_connection(("127.0.0.1", running.port)) as sock:
                sock.sendall(b"XXXX" + bytes(size - 4))
                sock.shutdown(socket.SHUT_WR)
                assert receive(sock) == b"no"

        connect()
        before, descriptors = resident_bytes(), len(os.listdir("/proc/self/fd"))
        for _ in range(count - 1):
            connect()
        running.wait_until(lambda view: sum(one.returned for one in view.connections) == 2 * count)
        running.wait_until(lambda view: len(view.connections) == proxy_module.MOST_REMEMBERED + 1)
        view = running.proxy.view()
        assert view.forwarded == count * size
        assert sum(one.count for one in view.connections) == count
        assert {one.kind for one in view.connections} == {ConnectionKind.OTHER}
        running.wait_until(lambda view: len(os.listdir("/proc/self/fd")) <= descriptors)
        assert resident_bytes() - before < 16 << 20
    assert len(list(tmp_path.glob("*.stream"))) == len(list(tmp_path.glob("*.return"))) == 64


def test_no_more_connections_are_open_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "MOST_FOREIGN", 3)
    monkeypatch.setattr(proxy_module, "MOST_OPEN", 6)
    with answering() as address, through(address) as running, ExitStack() as stack:

        def connect(opening: bytes) -> socket.socket:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            sock.settimeout(SECONDS)
            sock.sendall(opening)
            return sock

        def is_turned_away(opening: bytes) -> None:
            try:
                assert receive(connect(opening)) in (b"", b"no")
            except ConnectionResetError:
                pass

        strangers = [connect(b"XXXX") for _ in range(3)]
        running.wait_until(lambda view: view.forwarded == 12)
        is_turned_away(b"XXXX")
        running.wait_until(lambda view: view.turned_away == 1)
        running.wait_until(lambda view: sum(one.is_alive() for one in running.proxy._threads) == 3)
        silent = [connect(opening) for opening in (b"", b"\x11", b"\x11\x22\x33\x44")]
        running.wait_until(lambda view: len(view.connections) == 7)
        is_turned_away(b"")
        assert running.proxy.view().turned_away == 2
        monkeypatch.setattr(proxy_module, "SILENT_SECONDS", 0.0)
        for sock in silent:
            assert receive(sock) in (b"", b"no"), "who does not say what it carries is cut"
        strangers[0].shutdown(socket.SHUT_WR)
        assert receive(strangers[0]) == b"no", "who said something is not"


@pytest.mark.parametrize("name", ["proxy-analysis", "proxy-record", "proxy-back"])
def test_a_thread_that_cannot_be_had_costs_no_report(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_threads(monkeypatch, name)
    with (
        hosts(source_guest(64), waiting_guest(64)) as (here, there),
        through(there.controller.incoming(TCP), record=tmp_path) as running,
    ):
        info = here.migrate(running.uri)
        if name == "proxy-back":
            assert info.status is FAILED
            running.proxy.interrupt()
        view = running.result()
    if name == "proxy-back":
        assert view.verdict.outcome is ProxyOutcome.NOTHING
        return
    assert info.status is COMPLETED
    assert view.verdict.outcome is ProxyOutcome.COMPLETED
    assert "can't start new thread" in {"proxy-analysis": view.analysis_fault}.get(name, view.recording_fault)


def test_over_unix_sockets(tmp_path: Path) -> None:
    with hosts(source_guest(64), waiting_guest(64)) as (here, there):
        there.controller.incoming(f"unix:{tmp_path}/there")
        with Proxy(UnixUri(f"{tmp_path}/proxy"), UnixUri(f"{tmp_path}/there"), digests=False) as proxy:
            thread = threading.Thread(target=proxy.run, daemon=True)
            thread.start()
            assert here.migrate(f"unix:{tmp_path}/proxy").status is COMPLETED
            thread.join(SECONDS)
            assert not thread.is_alive()
            view = proxy.view()
    assert view.verdict.outcome is ProxyOutcome.COMPLETED
    assert view.survey is not None
    assert view.survey.digest is None


def test_where_nothing_can_be_recorded(tmp_path: Path) -> None:
    (tmp_path / "main.stream").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for where, why in (
        (tmp_path, "there is something in it; a recording needs an empty directory"),
        (tmp_path / "main.stream", "it is a file; a recording needs an empty directory"),
        (tmp_path / "main.stream" / "record", "Not a directory; a recording needs an empty directory"),
        (tmp_path / "link", "No such file or directory; a recording needs an empty directory"),
        (tmp_path / "a" / "b", f"there is no {tmp_path}/a to make it in"),
    ):
        with pytest.raises(RecordingError, match=f"^{where}: {why}"):
            Proxy(UnixUri(f"{tmp_path}/proxy"), TcpUri("127.0.0.1", 1), record=where)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("there_before", [False, True])
def test_a_directory_in_which_nothing_was_recorded_is_as_it_was(there_before: bool, tmp_path: Path) -> None:
    record = tmp_path / "record"
    if there_before:
        record.mkdir()
    with held_port() as port, through(f"tcp:127.0.0.1:{port}", record=record) as running:
        assert record.exists()
        with socket.create_connection(("127.0.0.1", running.port)):
            assert running.result().verdict.outcome is ProxyOutcome.UNREACHABLE
    assert record.exists() is there_before


@pytest.mark.parametrize("call", ["write", "fsync", None])
def test_a_recording_is_whole_and_its_owners_or_is_not_there(call: str | None, tmp_path: Path) -> None:
    directory = tmp_path / "record"
    with Cancellation() as cancellation, ExitStack() as stack:
        near, far = (
            stack.enter_context(SocketChannel(cancellation, "a peer", sock)) for sock in socket.socketpair()
        )
        connection = Connection(near, far, lambda connection: None)
        connection.kind = ConnectionKind.MAIN
        readers = []
        for tee, parts in ((connection.tee, (b"RAM",)), (connection.back, (b"it ", b"runs"))):
            readers.append(tee.attach())
            for part in parts:
                tee.room()[: len(part)] = part
                tee.commit(len(part))
            tee.end()
        recording = Recording(directory)

        def record() -> None:
            recording.start(connection, *readers)
            for thread in recording.threads:
                thread.join()

        if call is None:
            record()
        else:
            refusing(Refusal(call, errno.ENOSPC), record)
    files = {path.name: path for path in directory.iterdir()}
    if call is None:
        assert recording.fault == ""
        assert {name: path.read_bytes() for name, path in files.items()} == {
            "main.stream": b"RAM",
            "main.return": b"it runs",
        }
        modes = {stat.S_IMODE(path.stat().st_mode) for path in files.values()}
        assert (stat.S_IMODE(directory.stat().st_mode), modes) == (0o700, {0o600})
    else:
        assert recording.fault in (
            "main.stream: No space left on device",
            "main.return: No space left on device",
        )
        assert not files


def test_a_disk_that_stands_still_holds_no_answer_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    write = NewFile.write

    def write_when_released(file: NewFile, data: memoryview) -> None:
        released.wait()
        write(file, data)

    monkeypatch.setattr(NewFile, "write", write_when_released)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        through(f"tcp:127.0.0.1:{server.getsockname()[1]}", record=tmp_path / "record") as running,
        socket.create_connection(("127.0.0.1", running.port), SECONDS) as near,
    ):
        try:
            near.sendall(RAM)
            far, _ = server.accept()
            with far:
                assert far.recv(len(RAM), socket.MSG_WAITALL) == RAM
                for answer in (b"one", b"two", b"six"):
                    far.sendall(answer)
                    assert near.recv(3, socket.MSG_WAITALL) == answer
            near.shutdown(socket.SHUT_WR)
        finally:
            released.set()
        view = running.result()
    assert view.recording_fault == ""
    assert (tmp_path / "record" / "main.return").read_bytes() == b"onetwosix"
    assert (tmp_path / "record" / "main.stream").read_bytes() == RAM


# -- what is owed, and never comes ----------------------------------------------------------------------------

RAM = ram_stream(records("0 1 2 3 4 5 6 7"))
ANSWERED = RAM.replace(HEADER, HEADER + sections.command(Command.OPEN_RETURN_PATH))
"""The same stream, of a source that asks for answers."""


def migrate_through(running: Running, stream: bytes = RAM) -> None:
    """Send a whole stream, and wait for the destination's end."""
    with socket.create_connection(("127.0.0.1", running.port)) as near:
        near.sendall(stream)
        near.shutdown(socket.SHUT_WR)
        assert receive(near) == b"no"


@pytest.mark.parametrize(
    "opening", [b"\x11\x22\x33\x44", Init(bytes(16), 0).encode()], ids=["a magic number", "an initial packet"]
)
def test_a_stranger_that_begins_a_channel_and_holds_it_delays_nothing(
    opening: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "_OTHERS_SECONDS", 0.0)
    monkeypatch.setattr(proxy_module, "_CHANNELS_SECONDS", 0.0)
    with (
        answering() as address,
        through(address) as running,
        socket.create_connection(("127.0.0.1", running.port)) as stranger,
    ):
        stranger.sendall(opening)
        running.wait_until(lambda view: view.forwarded == len(opening))
        migrate_through(running)
        view = running.result()
    assert view.verdict.outcome is ProxyOutcome.UNCONFIRMED
    assert view.survey is not None
    assert view.survey.complete
    assert (view.survey.fault is None) == (len(opening) == 4)


@pytest.mark.parametrize("multifd", [False, True])
def test_a_stranger_at_a_sternas_migration_is_not_waited_for(multifd: bool) -> None:
    with hosts(source_guest(512), waiting_guest(512)) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities({"multifd": multifd})
        with (
            through(there.controller.incoming(TCP)) as running,
            socket.create_connection(("127.0.0.1", running.port)) as stranger,
        ):
            stranger.sendall(Init(bytes(16), 0).encode())
            running.wait_until(
                lambda view: [one.kind for one in view.connections] == [ConnectionKind.CHANNEL]
            )
            info = here.migrate(running.uri)
            stranger.shutdown(socket.SHUT_WR)
            view = running.result()
    assert info.status is COMPLETED, info.error
    assert view.survey is not None
    assert view.survey.flaw() is None
    assert len(view.survey.channels) == 2 * multifd
    kinds = [one.kind for one in view.connections]
    assert (kinds.count(ConnectionKind.OTHER), kinds.count(ConnectionKind.CHANNEL)) == (1, 2 * multifd)


def test_a_stranger_whose_channel_is_broken_does_not_hide_the_migration() -> None:
    with (
        answering() as address,
        through(address) as running,
        socket.create_connection(("127.0.0.1", running.port)) as stranger,
    ):
        stranger.sendall(Init(bytes(16), 0).encode() + b"junk" * 2000)
        running.wait_until(lambda view: view.forwarded == 8064)
        migrate_through(running)
        stranger.shutdown(socket.SHUT_WR)
        view = running.result()
    assert view.verdict.outcome is ProxyOutcome.UNCONFIRMED
    assert view.survey is not None
    assert view.survey.fault is not None
    assert "no multifd packet: it begins with 0x6a756e6b" in view.survey.fault.text
    assert (view.survey.complete, view.survey.main_fault, view.survey.bytes) == (True, None, len(RAM))


def test_channels_that_ended_before_a_migration_are_none_of_it() -> None:
    with answering() as address, through(address) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as stranger:
            stranger.sendall(Init(bytes(16), 0).encode())
            stranger.shutdown(socket.SHUT_WR)
            assert receive(stranger) == b"no"
        running.wait_until(lambda view: [one.kind for one in view.connections] == [ConnectionKind.OTHER])
        [ended] = running.proxy._connections
        assert len(ended.tee._view) == 0, "its ring is given back"
        migrate_through(running)
        view = running.result()
    assert view.survey is not None
    assert view.survey.flaw() is None


def test_interrupted_twice_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an analysis nor a disk that stands still."""
    monkeypatch.setattr(proxy_module, "_LEAVE_SECONDS", 0.0)
    released = threading.Event()
    read, commit = Surveyor.read, NewFile.commit

    def read_when_released(surveyor: Surveyor) -> None:
        released.wait()
        read(surveyor)

    def commit_when_released(file: NewFile) -> None:
        released.wait()
        commit(file)

    monkeypatch.setattr(Surveyor, "read", read_when_released)
    monkeypatch.setattr(NewFile, "commit", commit_when_released)
    with answering() as address, through(address, record=tmp_path) as running:
        try:
            migrate_through(running)
            running.wait_until(lambda view: "the analysis" in view.waiting)
            running.proxy.interrupt()
            running.proxy.interrupt()
            view = running.result()
        finally:
            released.set()
            for thread in running.proxy._workers():
                thread.join()
    assert view.verdict.outcome is ProxyOutcome.UNKNOWN
    assert "left before its end" in view.analysis_fault
    assert "left before all was written" in view.recording_fault


def test_interrupted_while_strangers_keep_coming() -> None:
    with answering() as address, ExitStack() as stack:
        proxy = stack.enter_context(Proxy(TcpUri("127.0.0.1", 0), parse_tcp(address.removeprefix("tcp:"))))
        strangers: list[socket.socket] = []

        def watch(proxy: Proxy) -> None:
            if strangers:
                return
            proxy.interrupt()
            port = int(proxy.uri.rpartition(":")[2])
            strangers.append(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
            strangers[0].sendall(b"XXXX")
            while not any(one.kind is ConnectionKind.OTHER for one in proxy.view().connections):
                pass

        thread = threading.Thread(target=proxy.run, args=(watch,), daemon=True)
        thread.start()
        thread.join(SECONDS)
        assert not thread.is_alive()
        assert proxy.view().verdict.outcome is ProxyOutcome.NOTHING


@contextmanager
def silent_destination(stream: bytes) -> Iterator[tuple[Running, socket.socket]]:
    """A proxy, and the source's end of a connection on which all of a stream went to a destination that says nothing."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        through(f"tcp:127.0.0.1:{server.getsockname()[1]}") as running,
        socket.create_connection(("127.0.0.1", running.port)) as near,
    ):
        near.sendall(stream)
        far, _ = server.accept()
        with far:
            running.wait_until(lambda view: view.survey is not None and view.survey.complete)
            yield running, near


@pytest.mark.parametrize(
    ("stream", "expected"), [(RAM, ProxyOutcome.UNCONFIRMED), (ANSWERED, ProxyOutcome.IN_DOUBT)]
)
def test_a_destination_that_has_all_and_is_interrupted_may_run_the_guest(
    stream: bytes, expected: ProxyOutcome
) -> None:
    with silent_destination(stream) as (running, _):
        running.proxy.interrupt()
        running.proxy.interrupt()
        view = running.result()
    assert view.verdict.outcome is expected
    if expected is ProxyOutcome.IN_DOUBT:
        assert view.verdict.reason.startswith("the proxy was interrupted before the destination said")


def test_a_destination_that_does_not_close_is_said_to_be_waited_for() -> None:
    with silent_destination(ANSWERED) as (running, near):
        near.shutdown(socket.SHUT_WR)
        running.wait_until(
            lambda view: view.waiting == "the destination to close its connection, at most 60 s"
        )
        running.proxy.interrupt()
        running.proxy.interrupt()
        view = running.result()
    assert view.verdict.outcome is ProxyOutcome.IN_DOUBT
    assert view.verdict.reason.startswith("the source closed the connection before the destination said")
    assert view.waiting == ""


@contextmanager
def connected() -> Iterator[tuple[Connection, socket.socket, socket.socket]]:
    """A connection, and the sockets of the source and the destination that it is between."""
    with closing(Cancellation()) as cancellation, ExitStack() as stack:
        near, source = (stack.enter_context(end) for end in socket.socketpair())
        far, destination = (stack.enter_context(end) for end in socket.socketpair())
        channels = (
            SocketChannel(cancellation, "source", near),
            SocketChannel(cancellation, "destination", far),
        )
        yield Connection(*channels, lambda one: None), source, destination


@pytest.mark.slow
@pytest.mark.parametrize("case", ["the source closed", "the destination closed", "the destination hangs"])
def test_no_end_is_waited_for_without_a_limit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "LAST_WORD_SECONDS", 0.05)
    monkeypatch.setattr(connection_module, "_LINGER_SECONDS", 0.05)
    with connected() as (connection, source, destination):
        writing = threading.Thread(target=send_all_that_is_taken, args=(source,), daemon=True)
        if case == "the source closed":
            source.shutdown(socket.SHUT_WR)
        elif case == "the destination closed":
            destination.shutdown(socket.SHUT_WR)
        else:
            connection.far.patience_seconds = 0.05
            writing.start()
        thread = threading.Thread(target=connection.run, daemon=True)
        thread.start()
        thread.join(SECONDS)
        assert not thread.is_alive()
        if writing.ident:
            writing.join()
    assert connection.forward_end is (End.RECEIVER_LOST if case == "the destination hangs" else End.CLOSED)
    assert (
        connection.first_end
        == {
            "the source closed": "the source closed the connection",
            "the destination closed": "the destination closed the connection",
            "the destination hangs": "the connection to the destination broke",
        }[case]
    )


def send_all_that_is_taken(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(bytes(1 << 20))


# -- the tap --------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 70)), max_size=60), st.integers(1, 2))
def test_readers_of_a_tap_find_every_byte(steps: list[tuple[int, int]], count: int) -> None:
    tee = Tee(64)
    readers = [tee.attach() for _ in range(count)]
    seen = [b""] * count
    content = b""
    for who, size in steps:
        if who == 0:
            if any(len(content) - reader.position == 64 for reader in readers):
                continue
            room = tee.room()[:size]
            data = random.Random(len(content)).randbytes(len(room))
            room[:] = data
            tee.commit(len(room))
            content += data
        elif who <= count and readers[who - 1].ready:
            buffer = bytearray(size)
            got = readers[who - 1].readinto(memoryview(buffer))
            seen[who - 1] += buffer[:got]
    tee.end()
    for i, reader in enumerate(readers):
        buffer = bytearray(7)
        while got := reader.readinto(memoryview(buffer)):
            seen[i] += buffer[:got]
        assert seen[i] == content
    assert tee.head == content[:HEAD_BYTES]
    assert tee.forwarded == len(content)


def test_a_reader_that_stands_still_is_left_behind() -> None:
    tee = Tee(16, patience_seconds=0.05)
    slow, other = tee.attach(), tee.attach()
    tee.room()[:16] = bytes(16)
    tee.commit(16)
    assert other.readinto(memoryview(bytearray(16))) == 16
    assert len(tee.room()) == 16
    assert tee.stalled_seconds > 0
    with pytest.raises(LeftBehind):
        slow.readinto(memoryview(bytearray(16)))
    tee.commit(4)
    assert other.readinto(memoryview(bytearray(16))) == 4


def test_a_source_has_more_patience_than_the_proxy_has_with_its_readers() -> None:
    assert 0 < PATIENCE_SECONDS < SocketChannel.patience_seconds


def test_a_tap_without_readers_never_waits() -> None:
    tee = Tee(16)
    tee.attach().close()
    for _ in range(10):
        tee.commit(len(tee.room()))
    assert tee.forwarded == 160
    assert tee.stalled_seconds == 0
