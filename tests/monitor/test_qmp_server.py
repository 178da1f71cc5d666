"""The QMP server against well-behaved, broken and hostile clients."""

import asyncio
import contextlib
import json
import resource
import select
import socket
import threading
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient
from tests.monitor.qmpserver import TIMEOUT, ServerThread, SmallTable, serving

from sterna.monitor import session as sessions
from sterna.monitor.addresses import AddressError, listen, parse_address
from sterna.monitor.client import ConnectionLost, QmpClient
from sterna.monitor.protocol import QmpError

MIB = 1 << 20
MAX_MESSAGE_BYTES = UNREAD_LIMIT_BYTES = MIB
"""As promised, not as the server has it: a limit that is wrong must not move the test with it."""
MAX_DEPTH = 256
SOCKET_BYTES = 1 << 12
"""What a client asks the kernel to keep for it; a little more is kept."""


class Raw:
    """A client that sends bytes as they are, and reads answers line by line."""

    def __init__(self, server: ServerThread) -> None:
        self.socket = server.raw()
        self.lines = self.socket.makefile("rb")
        self.greeting = self.read()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> dict:
        line = self.lines.readline()
        assert line.endswith(b"\r\n"), "the connection was closed"
        return json.loads(line)

    def ask(self, data: bytes) -> dict:
        self.send(data + b"\n")
        return self.read()

    def at_end(self) -> bool:
        try:
            return not self.lines.read(1)
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@pytest.fixture
def raw(server):
    client = Raw(server)
    yield client
    client.close()


@pytest.fixture
def negotiated(raw):
    assert raw.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}
    return raw


def test_greeting_is_shaped_like_qemus(raw) -> None:
    version = raw.greeting["QMP"]["version"]
    assert version["qemu"] == {"major": 7, "minor": 2, "micro": 0}
    assert version["package"].startswith("sterna")
    assert raw.greeting["QMP"]["capabilities"] == []


def test_commands_need_negotiation_first_and_once(raw) -> None:
    error = raw.ask(b'{"execute": "echo", "id": 7}')
    assert error["error"]["class"] == "CommandNotFound"
    assert "qmp_capabilities" in error["error"]["desc"]
    assert error["id"] == 7
    assert raw.ask(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')["error"]
    assert raw.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}
    assert raw.ask(b'{"execute": "qmp_capabilities"}')["error"]["class"] == "CommandNotFound"


@pytest.mark.parametrize(
    "identity", ["1", '"x"', "null", '[1, {"a": 2.5}]', "123456789012345678901234567890"]
)
def test_id_comes_back_as_it_was(negotiated, identity) -> None:
    answer = negotiated.ask(b'{"execute": "echo", "id": %s}' % identity.encode())
    assert answer["return"] == {}
    assert answer["id"] == json.loads(identity)


def test_no_id_gives_no_id(negotiated) -> None:
    assert negotiated.ask(b'{"execute": "echo"}') == {"return": {}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"[]", "QMP input must be a JSON object"),
        (b'"a"', "QMP input must be a JSON object"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b'{"exec": "x"}', "QMP input member 'exec' is unexpected"),
        (b'{"execute": 5}', "QMP input member 'execute' must be a string"),
        (b'{"execute": "echo", "arguments": []}', "QMP input member 'arguments' must be an object"),
        (b'{"execute": "nope"}', "The command nope has not been found"),
        (b'{"execute": }', "JSON parse error"),
        (b'{"execute": "\xff\xfe"}', "JSON parse error"),
        (b"\xff", "JSON parse error"),
        (b"}", "JSON parse error"),
        (b'{"execute": "ec', "JSON parse error"),
        (b"[" * 100_000, "nesting depth"),
        (b'{"a":' * 100_000, "nesting depth"),
    ],
)
def test_broken_messages_are_answered_and_the_session_goes_on(negotiated, message, expected) -> None:
    assert expected in negotiated.ask(message)["error"]["desc"]
    assert negotiated.ask(b'{"execute": "echo", "arguments": {"a": 1}}') == {"return": {"a": 1}}


def test_messages_need_no_line_ends_and_may_have_some_inside(negotiated) -> None:
    negotiated.send(b'{"execute":"echo","id":1}{"execute":\n"echo","id":2,\r\n"arguments":{"s":"}\\"{"}}\n\n')
    assert negotiated.read() == {"return": {}, "id": 1}
    assert negotiated.read() == {"return": {"s": '}"{'}, "id": 2}


def test_a_message_may_come_byte_by_byte(negotiated) -> None:
    for byte in b'{"execute": "echo", "arguments": {"\\"": "\\\\"}}':
        negotiated.send(bytes([byte]))
    assert negotiated.read() == {"return": {'"': "\\"}}


def test_endless_line_is_cut_off(server, negotiated) -> None:
    line = b"x" * (100 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        negotiated.socket.sendall(line)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 16 << 10
    with server.client() as other:
        assert other.command("echo", a=1) == {"a": 1}


def test_message_at_the_limit_passes_and_beyond_is_refused(negotiated) -> None:
    frame = b'{"execute": "echo", "arguments": {"a": "%s"}}'
    text = b"y" * (MAX_MESSAGE_BYTES - len(frame))
    assert negotiated.ask(frame % text)["return"]["a"] == text.decode()
    negotiated.send(frame[: frame.index(b"%")] + b"y" * MAX_MESSAGE_BYTES)
    assert str(MAX_MESSAGE_BYTES) in negotiated.read()["error"]["desc"]
    assert negotiated.at_end()


def test_client_that_leaves_during_its_command(server, table: SmallTable, negotiated) -> None:
    negotiated.send(b'{"execute": "wait"}\n')
    assert table.waiting.wait(TIMEOUT)
    negotiated.close()
    table.gate.set()
    with server.client() as other:
        assert other.command("echo") == {}


def test_client_that_leaves_in_the_middle_of_a_message(server, negotiated) -> None:
    negotiated.send(b'{"execute": "ec')
    negotiated.close()
    with server.client() as other:
        assert other.command("echo") == {}


def test_defect_in_a_command_is_an_error_not_the_end(negotiated) -> None:
    assert "defect" in negotiated.ask(b'{"execute": "defect"}')["error"]["desc"]
    assert negotiated.ask(b'{"execute": "echo"}') == {"return": {}}


@pytest.mark.parametrize("size", [10_000, 3 * MIB])
def test_client_that_does_not_read_events_is_disconnected(server, negotiated, size: int) -> None:
    """At the first event that finds more unread than the limit."""
    negotiated.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    data = {"text": "z" * size}
    enough = 2 + 2 * UNREAD_LIMIT_BYTES // size
    with server.client() as other:
        for count in range(enough):
            server.emit("NOISE", data)
            # This one reads, so it stays; its answer comes after the event was queued for both.
            assert other.command("echo", count=count) == {"count": count}
            other.events.clear()
    received = 0
    try:
        while chunk := negotiated.socket.recv(1 << 16):
            received += len(chunk)
    except ConnectionResetError:
        pass
    # What it left unread has been dropped; what the kernel had was its own.
    assert received < MIB


def test_a_client_may_leave_events_unread_up_to_the_limit(server, negotiated) -> None:
    negotiated.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    data = {"text": "z" * 10_000}
    count = UNREAD_LIMIT_BYTES // 10_200
    for _ in range(count):
        server.emit("NOISE", data)
    assert [negotiated.read()["event"] for _ in range(count)] == ["NOISE"] * count
    assert negotiated.ask(b'{"execute": "echo"}') == {"return": {}}


def unread_of(client: Raw, message: bytes, count: int) -> int:
    """Send a message so often and read nothing, until the server takes no more: bytes sent."""
    client.socket.setblocking(False)
    sent, total = 0, len(message) * count
    view = memoryview(message * count)
    while sent < total:
        # The server answers within a moment or waits for this client: whoever waits is stuck for good.
        _, writable, _ = select.select([], [client.socket], [], 1.0)
        if not writable:
            break
        sent += client.socket.send(view[sent : sent + (1 << 16)])
    client.socket.settimeout(TIMEOUT)
    return sent


def test_client_that_does_not_read_answers_is_not_read_from(server, negotiated) -> None:
    """What is kept for it, of its commands and of their answers, is bounded, and nothing is lost once it reads."""
    message = b'{"execute": "echo", "arguments": {"a": "%s"}}\n' % (b"w" * 50_000)
    sent = unread_of(negotiated, message, 1000)
    assert sent < 2 * MIB
    whole, rest = divmod(sent, len(message))
    answers = [negotiated.read() for _ in range(whole)]
    assert all(answer == {"return": {"a": "w" * 50_000}} for answer in answers)
    negotiated.send(message[rest:] if rest else message)
    assert negotiated.read() == {"return": {"a": "w" * 50_000}}


def test_depth_at_the_limit_passes_and_beyond_is_refused(negotiated) -> None:
    """`echo`'s argument is two levels down."""
    frame = b'{"execute": "echo", "arguments": {"a": %s}}'
    for depth, answered in ((MAX_DEPTH - 2, True), (MAX_DEPTH - 1, False)):
        answer = negotiated.ask(frame % (b"[" * depth + b"]" * depth))
        assert ("return" in answer) is answered
        assert answered or "nesting depth" in answer["error"]["desc"]


def test_events_reach_negotiated_clients_with_a_timestamp(server, raw) -> None:
    with server.client() as client:
        server.emit("STOP", {})
        server.emit("MIGRATION", {"status": "active"})
        first = client.wait_event(lambda event: True, TIMEOUT)
        assert first["event"] == "STOP"
        assert "data" not in first
        assert first["timestamp"]["seconds"] > 1_600_000_000
        assert 0 <= first["timestamp"]["microseconds"] < 1_000_000
        second = client.wait_event(lambda event: True, TIMEOUT)
        assert second["data"] == {"status": "active"}
    assert raw.ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}, "events came before negotiation"


def test_the_qemu_qmp_library_drives_it(server) -> None:
    async def drive() -> None:
        client = QMPClient("test")
        await client.connect(server.address.path)
        assert client.greeting is not None
        assert await client.execute("echo", {"a": [1, 2]}) == {"a": [1, 2]}
        with pytest.raises(ExecuteError, match="has not been found"):
            await client.execute("nope")
        with client.listener("STOP") as listener:
            server.emit("STOP", {})
            assert (await asyncio.wait_for(listener.get(), TIMEOUT))["event"] == "STOP"
        await client.disconnect()

    asyncio.run(drive())


def test_many_clients_at_once_and_a_limit(server) -> None:
    clients = [server.client() for _ in range(64)]
    with pytest.raises(ConnectionLost):
        server.client()
    for number, client in enumerate(clients):
        assert client.command("echo", n=number) == {"n": number}
        client.close()


def test_silent_clients_make_room_for_others_the_oldest_first(server) -> None:
    keeper = server.client()
    silent = [Raw(server) for _ in range(63)]
    others = [server.client() for _ in range(3)]
    assert [client.at_end() for client in silent[:3]] == [True] * 3
    assert silent[3].ask(b'{"execute": "qmp_capabilities"}') == {"return": {}}
    for client in (keeper, *others):
        assert client.command("echo", a=1) == {"a": 1}
        client.close()
    for client in silent:
        client.close()


def test_a_client_that_never_negotiates_is_disconnected(table: SmallTable, tmp_path: Path) -> None:
    with serving(table.execute, tmp_path / "impatient.sock", negotiation_seconds=0.05) as server:
        silent = Raw(server)
        assert silent.at_end()
        silent.close()


def test_a_client_that_has_negotiated_may_be_silent(server, negotiated) -> None:
    (session,) = server.server._sessions
    assert session._patience.when() is None


@pytest.mark.parametrize(
    "first",
    [
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1:4444\r\nContent-Type: text/plain\r\n\r\n",
        b'POST /{"execute":"qmp_capabilities"} HTTP/1.1\r\n',
        b"[]",
        b'"quoted"\n',
        b"[" * 1000,
        b'{"execute": "qmp\n',
    ],
)
def test_what_does_not_begin_with_an_object_is_not_qmp(raw, table: SmallTable, first: bytes) -> None:
    """A browser can be made to send this to a port of its own host, and what follows says the page."""
    body = b'{"execute": "qmp_capabilities"}\n{"execute": "wait"}\n'
    raw.send(first + body)
    assert "error" in raw.read()
    assert raw.at_end()
    assert not table.waiting.is_set()


def test_a_command_that_waits_holds_up_its_own_client_only(server, table: SmallTable, negotiated) -> None:
    negotiated.send(b'{"execute": "wait", "id": 1}\n{"execute": "echo", "id": 2}\n')
    assert table.waiting.wait(TIMEOUT)
    with server.client() as other:
        assert other.command("echo", a=1) == {"a": 1}
    table.gate.set()
    assert [negotiated.read()["id"] for _ in range(2)] == [1, 2]


def test_unix_socket_left_behind_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    address = parse_address(f"unix:{tmp_path}/s,server,wait=off")
    listen(address).socket.close()
    first = listen(address).socket
    with pytest.raises(AddressError, match="in use"):
        listen(address)
    first.close()


def test_tcp_listens_on_loopback_unless_told_otherwise() -> None:
    with listen(parse_address("tcp::0,server")).socket as listener:
        host, port = listener.getsockname()[:2]
        assert host == "127.0.0.1"
        with pytest.raises(AddressError, match="in use"):
            listen(parse_address(f"tcp:127.0.0.1:{port}"))


def test_descriptor_must_be_a_listening_socket(tmp_path: Path) -> None:
    with socket.socket() as idle, pytest.raises(AddressError, match="not a listening socket"):
        listen(parse_address(f"fd:{idle.fileno()}"))
    with (tmp_path / "file").open("w") as file, pytest.raises(AddressError, match="cannot listen"):
        listen(parse_address(f"fd:{file.fileno()}"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not a monitor address"),
        ("stdio", "not a monitor address"),
        ("unix:", "path"),
        ("unix:/tmp/x,srv", "unknown option"),
        ("unix:/tmp/x,wait=on", "wait=on"),
        ("unix:" + "x" * 108, "107"),
        ("tcp:localhost", "port"),
        ("tcp:localhost:", "port"),
        ("tcp:localhost:65536", "port"),
        ("tcp:localhost:x", "port"),
        ("tcp:localhost:000000000070000", "port"),
        ("tcp:localhost:" + "0" * 9 + "9" * 20, "port"),
        ("tcp:localhost:" + "0" * 5000, "port"),
        ("fd:-1", "descriptor"),
        ("vsock:1:2", "not a monitor address"),
    ],
)
def test_malformed_addresses(text: str, expected: str) -> None:
    with pytest.raises(AddressError, match=expected):
        parse_address(text)


def test_client_refuses_what_is_not_qmp(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    with there:
        there.sendall(b"SSH-2.0-OpenSSH\r\n")
        with pytest.raises(ConnectionLost, match="QMP"):
            QmpClient(here, "peer", TIMEOUT)


def test_client_raises_the_servers_errors(server) -> None:
    with server.client() as client, pytest.raises(QmpError, match="has not been found") as caught:
        client.command("nope")
    assert caught.value.error_class == "CommandNotFound"


@pytest.mark.parametrize(
    "said",
    [
        b'{"QMP": "\xff"}\n',
        b'{"QMP": 5}\n',
        b"[1]\n",
        b'{"QMP": {}}\n{"return": {}}\n{"error": 5}\n',
        b'{"QMP": {}}\n{"return": {}}\n{"return": "\xc3(\n',
        b'{"QMP": {}}\n{"return": {}}\n' + b"[" * 5000 + b"\n",
    ],
)
def test_a_client_leaves_a_server_that_says_nonsense(said: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(said)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionLost, match="does not speak QMP"), QmpClient(near, "it", 5) as client:
            client.command("query-status")


@pytest.mark.parametrize("said", [b"", b'{"QMP": '])
def test_a_server_that_does_not_greet_may_have_another_client(said: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(said)
        with pytest.raises(
            ConnectionLost, match=r"did not greet within 0\.05 s: does another client hold it"
        ):
            QmpClient(near, "it", TIMEOUT, greeting_seconds=0.05)


@pytest.mark.parametrize("said", [b"", b'{"return"'])
def test_an_answer_is_not_waited_for_for_ever(said: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b'{"QMP": {}}\n{"return": {}}\n' + said)
        with (
            QmpClient(near, "it", 0.05, greeting_seconds=TIMEOUT) as client,
            pytest.raises(ConnectionLost, match=r"does not answer: 'query-status' was sent 0\.05 s ago"),
        ):
            client.command("query-status")


def test_an_answer_that_comes_late_is_not_the_next_commands() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b'{"QMP": {}}\n{"return": {}}\n')
        with QmpClient(near, "it", 0.05, greeting_seconds=TIMEOUT) as client:
            with pytest.raises(ConnectionLost, match="does not answer: 'query-status'"):
                client.command("query-status")
            with contextlib.suppress(OSError):
                far.sendall(b'{"return": "late"}\n')
            with pytest.raises(ConnectionLost, match=r"^it: "):
                client.command("query-migrate")


def test_events_are_no_answer() -> None:
    """However many there are. The far end writes them until nobody listens."""
    near, far = socket.socketpair()

    def talk() -> None:
        try:
            while True:
                far.sendall(b'{"event": "NOISE"}\n' * 1000)
        except OSError:
            pass

    with near, far:
        far.sendall(b'{"QMP": {}}\n{"return": {}}\n')
        thread = threading.Thread(target=talk)
        with QmpClient(near, "it", 0.1, greeting_seconds=TIMEOUT) as client:
            thread.start()
            with pytest.raises(ConnectionLost, match="does not answer"):
                client.command("query-status")
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def test_what_a_server_says_moves_no_cursor() -> None:
    near, far = socket.socketpair()
    said = [
        {"QMP": {"version": "\x1b[2J"}},
        {"return": {}},
        {"return": {"\x1b": ["a\rb\r\nc", 5, None]}},
        {"error": {"class": "\x1bx", "desc": "\x1b]0;title\x07"}},
    ]
    with near, far:
        far.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in said))
        with QmpClient(near, "it", TIMEOUT) as client:
            assert client.greeting == {"version": "\\x1b[2J"}
            assert client.command("query-status") == {"\\x1b": ["a\\rb\r\nc", 5, None]}
            with pytest.raises(QmpError) as caught:
                client.command("query-status")
    assert caught.value.desc == "\\x1b]0;title\\x07"
    assert caught.value.error_class == "\\x1bx"


def test_signals_are_heard_while_the_end_waits_for_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command here ends by what the server's loop does, as the process does by a second signal."""
    monkeypatch.setattr(sessions, "_CLOSE_SECONDS", 0.05)
    table = SmallTable()
    with serving(table.execute, tmp_path / "q") as server:
        client = server.raw()
        client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "wait"}')
        assert table.waiting.wait(TIMEOUT)
        server.call_later(1.0, table.gate.set)
    client.close()
