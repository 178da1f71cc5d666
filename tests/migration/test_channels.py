"""URIs and the channels behind them."""

import contextlib
import errno
import os
import select
import shlex
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.ports import held_port
from tests.refusal import Refusal, refusing

from sterna.host.lookup import Address
from sterna.memory.vectors import vectors_of
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import sockets
from sterna.migration.channels import uri as uris
from sterna.migration.channels.channel import Channel
from sterna.migration.errors import Cancelled, ChannelError, ConnectionRefused, UriError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tcp:localhost:4321", "tcp:localhost:4321"),
        ("tcp::4321", "tcp::4321"),
        ("tcp:[::1]:4321", "tcp:[::1]:4321"),
        ("unix:/tmp/a b", "unix:/tmp/a b"),
        ("exec:cat > x", "exec:cat > x"),
        ("fd:7", "fd:7"),
        ("file:/x:y", "file:/x:y"),
    ],
)
def test_uris_are_understood(text: str, shown: str) -> None:
    assert str(uris.parse(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp",
        "tcp:",
        "tcp:host",
        "tcp:host:",
        "tcp:host:x",
        "tcp:host:-1",
        "tcp:host:65536",
        "tcp:host:99999999999999999999",
        "tcp:::1:80",
        "tcp:[::1:80",
        "tcp:[::1]80",
        "unix:",
        "unix:" + "x" * 108,
        "unix:a\0b",
        "exec:",
        "exec:  ",
        "fd:",
        "fd:stdin",
        "fd:-1",
        "fd:٣",
        "file:",
        "rdma:host:1",
        "x" * 1000,
    ],
)
def test_malformed_uris_give_one_line_with_the_form(text: str) -> None:
    with pytest.raises(UriError) as caught:
        uris.parse(text)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    assert len(message) < 300


def test_nobody_waits_at_port_0() -> None:
    assert uris.parse_destination("tcp:127.0.0.1:1") == uris.parse("tcp:127.0.0.1:1")
    with pytest.raises(UriError, match="nobody can be connected to at port 0"):
        uris.parse_destination("tcp:127.0.0.1:0")


@pytest.mark.parametrize(
    ("listen", "connect", "same"),
    [
        ("tcp:127.0.0.1:4444", "tcp:127.0.0.1:4444", True),
        ("tcp::4444", "tcp:localhost:4444", True),
        ("tcp:0.0.0.0:4444", "tcp:127.0.0.1:4444", True),
        ("tcp:0.0.0.0:4444", "tcp:192.0.2.1:4444", False),
        ("tcp:127.0.0.1:4444", "tcp:127.0.0.2:4444", False),
        ("tcp:127.0.0.1:4444", "tcp:127.0.0.1:4445", False),
        ("tcp:[::1]:4444", "tcp:127.0.0.1:4444", False),
        ("tcp:[::]:4444", "tcp:127.0.0.1:4444", False),
        ("tcp:127.0.0.1:4444", "unix:/run/here", False),
        ("unix:/run/here", "tcp:127.0.0.1:4444", False),
        ("unix:/run/here", "unix:/run/../run/./here", True),
        ("unix:/run/here", "unix:/run/there", False),
    ],
)
def test_who_connects_to_whom(listen: str, connect: str, same: bool) -> None:
    listener = uris.parse(listen)
    assert isinstance(listener, uris.ListeningUri)
    assert listener.serves(uris.parse(connect)) is same


def listening_pair(cancellation: Cancellation, uri: str) -> tuple[Channel, Channel]:
    with uris.parse(uri).listen() as listener:
        near = uris.parse(listener.uri).connect(cancellation)
        return near, listener.accept(cancellation, cancellation)


@pytest.mark.parametrize("kind", ["tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp::0", "unix:{}/sock"])
def test_sockets_carry_gathered_bytes_whole(kind: str, tmp_path: Path) -> None:
    if "::1" in kind and not _has_ipv6():
        pytest.skip("this host has no IPv6")
    rng = np.random.default_rng(5)
    pieces = [rng.integers(0, 256, size, dtype=np.uint8) for size in rng.integers(0, 9000, 3000)]
    vectors = np.array([[piece.ctypes.data, piece.size] for piece in pieces], dtype=np.uint64)
    expected = np.concatenate(pieces).tobytes()
    with Cancellation() as cancellation:
        near, far = listening_pair(cancellation, kind.format(tmp_path))
        with near, far:
            received = bytearray()

            def receive() -> None:
                # Small reads keep the sender's buffer full, so that writes stop in the middle of vectors.
                buffer = bytearray(4097)
                while got := far.readinto(memoryview(buffer)):
                    received.extend(buffer[:got])

            thread = threading.Thread(target=receive)
            thread.start()
            near.send_vectors(vectors)
            near.end_writing()
            thread.join()
        assert received == expected
        assert near.transferred == len(expected)


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_cancelling_ends_a_write_that_nobody_reads_and_a_read_that_nobody_feeds() -> None:
    with Cancellation() as cancellation:
        near, far = listening_pair(cancellation, "tcp:127.0.0.1:0")
        with near, far:
            outcomes: list[str] = []

            def write() -> None:
                with pytest.raises(Cancelled):
                    near.send(bytes(64 << 20))
                outcomes.append("write")

            def read() -> None:
                with pytest.raises(Cancelled):
                    near.readinto(memoryview(bytearray(10)))
                outcomes.append("read")

            threads = [threading.Thread(target=write), threading.Thread(target=read)]
            for thread in threads:
                thread.start()
            # The writer has filled the buffers when the far end can read more than one of them holds.
            assert far.wait_readable(300)
            cancellation.set()
            for thread in threads:
                thread.join(300)
            assert sorted(outcomes) == ["read", "write"]


def test_errors_name_the_peer_and_the_cause(tmp_path: Path) -> None:
    with held_port() as port, Cancellation() as cancellation:
        taken = pytest.raises(
            ChannelError, match=f"cannot listen on tcp:127.0.0.1:{port}: address already in use"
        )
        with socket.create_server(("127.0.0.1", port)), taken:
            uris.parse(f"tcp:127.0.0.1:{port}").listen()
        with pytest.raises(ConnectionRefused, match=f"connection refused by tcp:127.0.0.1:{port}"):
            uris.parse(f"tcp:127.0.0.1:{port}").connect(cancellation)
        with pytest.raises(ConnectionRefused, match="connection refused by unix:"):
            uris.parse(f"unix:{tmp_path}/nobody").connect(cancellation)
        with pytest.raises(ChannelError, match=r"cannot write file:.*/no/file: no such file"):
            uris.parse(f"file:{tmp_path}/no/file").connect(cancellation)
        with pytest.raises(ChannelError, match="fd:987 cannot be used: bad file descriptor"):
            uris.parse("fd:987").connect(cancellation)


@pytest.mark.parametrize("backwards", [False, True])
def test_only_when_every_address_refuses_nobody_listens(backwards: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        refusing: Address = (socket.AF_INET, server.getsockname())
    unreachable: Address = (socket.AF_INET, ("224.0.0.1", 9))
    attempts = [unreachable, refusing][:: -1 if backwards else 1]
    with Cancellation() as cancellation:
        with pytest.raises(ChannelError) as caught:
            sockets.connect(attempts, "tcp:twofold:9", cancellation)
        assert not isinstance(caught.value, ConnectionRefused)
        assert str(caught.value).startswith("cannot connect to tcp:twofold:9: ")
        assert "127.0.0.1: connection refused" in str(caught.value)
        assert "224.0.0.1: network is unreachable" in str(caught.value)
        with pytest.raises(ConnectionRefused):
            sockets.connect([refusing, refusing], "tcp:twofold:9", cancellation)
        with pytest.raises(ChannelError, match=r"cannot connect to tcp:twofold:9: network is unreachable"):
            sockets.connect([unreachable], "tcp:twofold:9", cancellation)


def test_an_address_that_does_not_answer_does_not_keep_from_trying_the_next() -> None:
    with (
        Cancellation() as cancellation,
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        socket.create_server(("127.0.0.1", 0)) as server,
        contextlib.ExitStack() as stack,
    ):
        # Nobody accepts: once the queue is full, the kernel does not answer any more.
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
            queue = select.poll()
            queue.register(waiting, select.POLLOUT)
            if not queue.poll(100):
                break
        attempts: list[Address] = [
            (socket.AF_INET, full.getsockname()),
            (socket.AF_INET, server.getsockname()),
        ]
        with sockets.connect(attempts, "tcp:twofold:9", cancellation, timeout_seconds=0.1):
            server.accept()[0].close()
        with pytest.raises(ChannelError, match=r"cannot connect to tcp:full:9: no answer in 0\.1 s"):
            sockets.connect(attempts[:1], "tcp:full:9", cancellation, timeout_seconds=0.1)


def test_a_stale_unix_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
        stale.listen()
    with uris.parse(f"unix:{path}").listen(), pytest.raises(ChannelError, match="address already in use"):
        uris.parse(f"unix:{path}").listen()
    assert not path.exists()


def test_an_exec_channel_is_delivered_when_the_command_exits_with_0(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Cancellation() as cancellation:
        with uris.parse(f"exec:cat > '{out}'").connect(cancellation) as channel:
            assert not channel.two_way
            channel.send(b"x" * 300_000)
            channel.finish()
        assert out.read_bytes() == b"x" * 300_000
        with uris.parse("exec:cat > /dev/null; exit 3").connect(cancellation) as channel:
            channel.send(b"x")
            with pytest.raises(ChannelError, match="exited with 3"):
                channel.finish()
        closed = uris.parse("exec:exec 0<&-").connect(cancellation)
        with closed, pytest.raises(ChannelError, match="broken pipe"):
            closed.send(bytes(4 << 20))


def test_closing_kills_a_command_that_hangs() -> None:
    with Cancellation() as cancellation:
        channel = uris.parse("exec:exec sleep 1000").connect(cancellation)
        process = channel._process
        channel.close()
        assert process.returncode == -9


def test_a_file_that_was_not_finished_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with Cancellation() as cancellation:
        with uris.parse(f"file:{path}").connect(cancellation) as channel:
            channel.send(b"half")
        assert not path.exists()
        with uris.parse(f"file:{path}").connect(cancellation) as channel:
            channel.send(b"whole")
            channel.finish()
        assert path.read_bytes() == b"whole"


def test_the_file_that_was_there_survives_until_the_new_one_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"the only copy of a guest")
    with Cancellation() as cancellation:
        with uris.parse(f"file:{path}").connect(cancellation) as channel:
            channel.send(b"half")
        assert path.read_bytes() == b"the only copy of a guest"
        with uris.parse(f"file:{path}").connect(cancellation) as channel:
            channel.send(b"whole")
            assert path.read_bytes() == b"the only copy of a guest"
            channel.finish()
    assert path.read_bytes() == b"whole"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["stream"]


@pytest.mark.parametrize("call", ["writev", "fsync", "close", "renameat"])
def test_a_stream_that_the_disk_does_not_take_is_no_stream(call: str, tmp_path: Path) -> None:
    """Among them the sync: a file that is not on the disk when the guest is given up is no save."""
    path = tmp_path / "stream"
    path.write_bytes(b"old")
    data = np.arange(100, dtype=np.uint8)
    vectors = np.array([[data.ctypes.data, data.size]], dtype=np.uint64)
    with Cancellation() as cancellation:
        channel = uris.parse(f"file:{path}").connect(cancellation)
        fd = channel._write_fd

        def write() -> None:
            with channel:
                channel.send_vectors(vectors)
                channel.finish()

        reason = f"(writing to|completing) file:{path}: no space left on device"
        with pytest.raises(ChannelError, match=reason):
            refusing(Refusal(call, errno.ENOSPC, fd=None if call == "renameat" else fd), write)
    if call == "close":
        os.close(fd)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["stream"]


def test_file_is_for_files_and_says_what_is_for_others(tmp_path: Path) -> None:
    fifo = tmp_path / "a pipe"
    os.mkfifo(fifo)
    with Cancellation() as cancellation:
        for path, kind in ((fifo, "a named pipe"), ("/dev/null", "a character device")):
            quoted = shlex.quote(str(path))
            with pytest.raises(
                ChannelError,
                match=f"cannot write .*: it is {kind}, not a regular file; use exec:cat > {quoted}$",
            ):
                uris.parse(f"file:{path}").connect(cancellation)
        with pytest.raises(ChannelError, match=r"cannot read .*: it is a named pipe, .*; use exec:cat '"):
            uris.parse(f"file:{fifo}").open_incoming(cancellation)
        with pytest.raises(ChannelError, match=r"cannot write .*: it is a directory, not a regular file$"):
            uris.parse(f"file:{tmp_path}").connect(cancellation)


def _socket_of(channel: Channel) -> socket.socket:
    return socket.socket(fileno=os.dup(channel.descriptors()[0]))


def test_both_ends_of_a_connection_notice_a_host_that_vanished() -> None:
    """Within half a minute, without a byte to send: the kernel asks."""
    with Cancellation() as cancellation:
        near, far = listening_pair(cancellation, "tcp:127.0.0.1:0")
        with near, far, uris.parse(f"fd:{near.descriptors()[0]}").connect(cancellation) as passed_on:
            for channel in (near, far, passed_on):
                with _socket_of(channel) as end:
                    assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                    idle, interval, count = (
                        end.getsockopt(socket.IPPROTO_TCP, option)
                        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                    )
                    assert idle + interval * count <= 30
                    assert 0 < end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 30_000


@pytest.mark.parametrize("kind", ["tcp:127.0.0.1:0", "unix:{}/s"])
def test_a_peer_that_takes_nothing_is_not_written_to_for_ever(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < sockets.SocketChannel.patience_seconds <= 30
    monkeypatch.setattr(sockets.SocketChannel, "patience_seconds", 0.05)
    with Cancellation() as cancellation:
        near, far = listening_pair(cancellation, kind.format(tmp_path))
        with near, far:
            data = bytes(64 << 20)
            with pytest.raises(ChannelError, match=r"^writing to .*: it took nothing for 0\.05 s$"):
                near.send(data)
            with pytest.raises(ChannelError, match=r"^writing to .*: it took nothing for 0\.05 s$"):
                near.send_vectors(vectors_of(data))


def test_a_unix_socket_that_nobody_accepts_on_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    path = str(tmp_path / "full")
    with (
        Cancellation() as cancellation,
        socket.socket(socket.AF_UNIX) as full,
        socket.socket(socket.AF_UNIX) as first,
    ):
        full.bind(path)
        full.listen(0)
        first.connect(path)
        with pytest.raises(ChannelError, match=r"full: nobody accepted the connection in 0\.1 s$"):
            uris.parse(f"unix:{path}").connect(cancellation, 0.1)


def test_cancelling_ends_the_wait_for_a_name_service(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()
    real = socket.getaddrinfo

    def silent(host: str, port: int, *arguments: int, **named: int) -> object:
        if named["flags"] & socket.AI_NUMERICHOST:
            return real(host, port, *arguments, **named)
        asked.set()
        answer.wait(300)
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    with Cancellation() as cancellation:
        outcome: list[BaseException] = []

        def connect() -> None:
            try:
                uris.parse("tcp:no.such.host:1").connect(cancellation)
            except Cancelled as cancelled:
                outcome.append(cancelled)

        thread = threading.Thread(target=connect)
        thread.start()
        assert asked.wait(300)
        cancellation.set()
        thread.join(300)
        assert len(outcome) == 1
    answer.set()
    for thread in threading.enumerate():
        if thread.name == "host-lookup":
            thread.join(300)


def test_descriptors_are_duplicated_and_sockets_work_both_ways() -> None:
    with Cancellation() as cancellation:
        a, b = socket.socketpair()
        with a, b, uris.parse(f"fd:{a.fileno()}").connect(cancellation) as channel:
            assert channel.two_way
            channel.send(b"ping")
            assert b.recv(10) == b"ping"
        read, write = os.pipe()
        try:
            with uris.parse(f"fd:{write}").connect(cancellation) as channel:
                assert not channel.two_way
                channel.send(b"ping")
            assert os.read(read, 10) == b"ping"
        finally:
            os.close(read)
            os.close(write)


@pytest.mark.parametrize("read", [True, False])
def test_what_nobody_has_read_has_not_arrived(read: bool) -> None:
    """On one host. Closing throws it away, and it is counted no more."""
    near, far = socket.socketpair()
    with far, Cancellation() as cancellation, sockets.SocketChannel(cancellation, "it", near) as channel:
        channel.send(b"x")
        with pytest.raises(ChannelError, match=r"it has not taken what was sent last in 0\.1 s"):
            channel.await_arrival(0.1)
        if read:
            far.recv(1)
        far.close()
        if read:
            channel.await_arrival(0.1)
        else:
            with pytest.raises(ChannelError, match="connection reset"):
                channel.await_arrival(0.1)


def test_what_a_tcp_peers_host_has_has_arrived() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Cancellation() as cancellation:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        with far, sockets.SocketChannel(cancellation, "it", near) as channel:
            channel.send(b"x")
            channel.await_arrival(60)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            far.close()
            assert channel.hung_up()
            with pytest.raises(ChannelError, match="connection reset"):
                channel.await_arrival(60)
