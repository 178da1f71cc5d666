"""What a source makes of the messages that come back."""

import socket
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl

import pytest

from sterna.host.printable import describe
from sterna.migration import handshake
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.errors import ChannelError, ProtocolError
from sterna.migration.handshake import Nack, PrivateMessage
from sterna.migration.peer import NackError, Peer
from sterna.stream.return_path import ReturnMessage, pong
from sterna.stream.wire import StreamError


@contextmanager
def pair() -> Iterator[tuple[Peer, socket.socket]]:
    """A source's peer, and the socket of the destination."""
    near, far = socket.socketpair()
    with near, far, Cancellation() as cancellation:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with uris.parse(f"fd:{near.fileno()}").connect(cancellation) as channel:
            yield Peer(channel), far


def unread(far: socket.socket) -> int:
    """Bytes that were written to the other end and have not been read there."""
    answer = bytearray(4)
    ioctl(far.fileno(), termios.TIOCOUTQ, answer)
    return int.from_bytes(answer, "little")


def test_a_peer_that_talks_without_end_is_refused_at_its_first_message() -> None:
    with pair() as (peer, far):
        far.setblocking(False)
        for _ in range(4):
            far.send(pong(1).encode() * 5000)
        before = unread(far)
        with pytest.raises(ProtocolError, match="a message of type 0x2 out of turn"):
            peer.check()
        assert before > unread(far) > 0, "the rest stays where it is"


def test_what_the_destination_said_counts_before_its_going() -> None:
    with pair() as (peer, far):
        peer.check()
        data = ReturnMessage(PrivateMessage.NACK, handshake.encode(Nack("no room"))).encode()
        far.send(data[:5])
        peer.check()
        far.send(data[5:])
        far.shutdown(socket.SHUT_RDWR)
        with pytest.raises(NackError, match="destination refused: no room"):
            peer.check()
        with pytest.raises(ChannelError, match="closed the connection"):
            peer.check()


def test_a_reason_counts_before_what_is_malformed() -> None:
    with pair() as (peer, far):
        nack = ReturnMessage(PrivateMessage.NACK, handshake.encode(Nack("no room"))).encode()
        far.send(nack + b"\0\x63\0\0")
        with pytest.raises(NackError, match="destination refused: no room"):
            peer.wait(5)
        # What is wrong is known: nothing more is waited for.
        with pytest.raises(StreamError, match="a message of unknown type 0x63"):
            peer.wait(5)


def test_a_ping_is_answered_in_time_or_later_but_not_unasked() -> None:
    with pair() as (peer, far):
        assert not peer.ponged(1, 0.0)
        peer.ping(1)
        far.send(pong(1).encode()[:3])
        assert not peer.ponged(1, 5), "a part is no answer"
        far.send(pong(1).encode()[3:])
        assert peer.ponged(1, 5)
        peer.ping(2)
        peer.ping(3)
        far.send(pong(2).encode())
        assert not peer.ponged(3, 5), "an answer to another ping"
        far.send(pong(3).encode())
        peer.check()  # it was not waited for, and may come while the stream goes on
        far.send(pong(3).encode() + ReturnMessage(PrivateMessage.READY, b"").encode())
        assert peer.wait(5).type == PrivateMessage.READY
        far.send(pong(4).encode())
        with pytest.raises(ProtocolError, match="a message of type 0x2 out of turn"):
            peer.ponged(3, 5)


def test_a_peer_that_accepts_and_never_answers_is_told_from_one_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sterna.migration.peer.GREETING_SECONDS", 0.05)
    with (
        pair() as (peer, _),
        pytest.raises(ChannelError, match=r"accepted the connection and did not answer the greeting within"),
    ):
        peer.greet()


def test_a_reason_is_one_line_that_no_terminal_obeys() -> None:
    nack = Nack("\x1b]0;title\x07\x1b[2Jno room\nVERIFIED")
    assert describe(NackError(nack)) == "destination refused: \\x1b]0;title\\x07\\x1b[2Jno room VERIFIED"
