"""Stream sockets as channels: what `tcp:` and `unix:` share."""

import errno
import fcntl
import os
import select
import socket
import sys
import termios
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from sterna.host.address import InetAddress
from sterna.host.closing import Closing
from sterna.host.lookup import Address
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel, describe
from sterna.migration.errors import ChannelError, ConnectionRefused

BACKLOG = 512
"""Connections that may wait to be accepted: all channels of a migration come at once."""
CONNECT_SECONDS = 30.0
"""How long a host may take to answer a connection."""
VANISHED_SECONDS = 30
"""How long the other end may not answer, or take none of what is sent to it, before the connection counts as broken."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4}
_LINGER_SECONDS = 2.0
_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 1.0
_ARRIVAL_PAUSE_SECONDS = 0.001
"""Nothing wakes who waits for an acknowledgement, and a guest stands still meanwhile."""
_PASSING = frozenset(
    {
        # Too little of something, which comes back when others let go of it.
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        # Errors of the new connection, which accept hands on (accept(2), "Error handling").
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.EPERM,
    }
)
"""Errors of accept after which the listening socket is as good as before."""


class SocketChannel(Channel):
    """A connected stream socket."""

    patience_seconds = VANISHED_SECONDS

    def __init__(self, cancellation: Cancellation, peer: str, sock: socket.socket) -> None:
        super().__init__(cancellation, peer, read_fd=sock.fileno(), write_fd=sock.fileno(), owner=sock)
        self._socket = sock
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A host that vanished is noticed when this side only waits (keepalive), and when it has sent something.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED_SECONDS * 1000)

    def unsent_bytes(self) -> int:
        """Bytes that were written and that the peer's host has not acknowledged yet (SIOCOUTQ)."""
        try:
            return self._outstanding()
        except OSError:
            return 0

    def _outstanding(self) -> int:
        answer = bytearray(4)
        fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, answer)
        return int.from_bytes(answer, sys.byteorder)

    def await_arrival(self, seconds: float) -> None:
        """As `Channel.await_arrival`: a TCP peer's host has acknowledged it, a Unix socket's other end has read it."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                left = self._outstanding()
                # What was thrown away unread or unacknowledged is an error, and that is there before it is gone from the count.
                code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            except OSError as error:
                raise ChannelError(f"{self.peer}: {describe(error)}") from error
            if code:
                raise self._write_error(code)
            if not left:
                return
            if time.monotonic() >= deadline:
                raise ChannelError(f"{self.peer} has not taken what was sent last in {seconds:.1f} s")
            self._cancellation.sleep(_ARRIVAL_PAUSE_SECONDS)

    def duplicate(self, cancellation: Cancellation) -> "SocketChannel":
        """The same connection, which lasts until both are closed.

        :raise OSError: When the host has no descriptor to spare.
        """
        return SocketChannel(cancellation, self.peer, self._socket.dup())

    def end_writing(self) -> None:
        """Shut down this side's direction: the peer reads to the end of what was written."""
        self._shut(socket.SHUT_WR)

    def shut_down(self) -> None:
        """End both directions: whoever waits on the channel, in whichever thread, comes back at once. It stays to be closed."""
        self._shut(socket.SHUT_RDWR)

    def stop_reading(self) -> None:
        """Whoever waits for bytes, in whichever thread, finds the stream ended; writing goes on."""
        self._shut(socket.SHUT_RD)

    def _shut(self, how: int) -> None:
        with suppress(OSError):  # the connection is gone already
            self._socket.shutdown(how)

    def hung_up(self) -> bool:
        """Whether the peer has ended the connection, or its direction of it."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def drain(self) -> None:
        """Read and forget until the peer closes, for a short while.

        Closing with unread bytes resets the connection, and the peer could lose the reason it was sent.
        """
        scratch = bytearray(1 << 20)
        deadline = time.monotonic() + _LINGER_SECONDS
        try:
            while self.wait_readable(deadline - time.monotonic()):
                if not self.readinto_now(scratch):
                    return
        except ChannelError:
            return


def connect(
    attempts: list[Address],
    peer: str,
    cancellation: Cancellation,
    timeout_seconds: float = CONNECT_SECONDS,
) -> SocketChannel:
    """Connect to the first address that answers.

    :param attempts: addresses, at least one
    :param timeout_seconds: for each address
    :raise ConnectionRefused: When nobody listens there: every address refuses.
    :raise ChannelError: When no address answers, for another reason; the text gives that of each.
    :raise Cancelled: When the migration is cancelled while it waits.
    """
    assert attempts
    reasons: list[str] = []
    refused = True
    for family, address in attempts:
        result = _try_address(family, address, peer, cancellation, timeout_seconds)
        if isinstance(result, SocketChannel):
            return result
        reasons.append(str(result))
        # Whoever is asked at an address that did not answer may be there all the same.
        refused = refused and isinstance(result, ConnectionRefused)
    if refused:
        raise ConnectionRefused(f"connection refused by {peer}: nobody listens there")
    if len(reasons) > 1:
        reasons = [
            f"{_host(address)}: {reason}" for (_, address), reason in zip(attempts, reasons, strict=True)
        ]
    raise ChannelError(f"cannot connect to {peer}: {'; '.join(reasons)}")


def _try_address(
    family: socket.AddressFamily,
    address: object,
    peer: str,
    cancellation: Cancellation,
    timeout_seconds: float,
) -> SocketChannel | ChannelError:
    """A channel to one address, or why there is none."""
    with ExitStack() as stack:
        try:
            sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setblocking(False)
            code = sock.connect_ex(address)  # type: ignore[arg-type]
            deadline = time.monotonic() + timeout_seconds
            while code == errno.EAGAIN and time.monotonic() < deadline:
                # A Unix socket's backlog is full (connect(2)); TCP waits by itself.
                cancellation.sleep(_PAUSE_SECONDS)
                code = sock.connect_ex(address)  # type: ignore[arg-type]
        except (OSError, ValueError, OverflowError) as error:
            return ChannelError(describe(error))
        if code == errno.EINPROGRESS:
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            poll.register(cancellation.fileno(), select.POLLIN)
            ready = poll.poll(timeout_seconds * 1000)
            cancellation.check()
            if not ready:
                return ChannelError(f"no answer in {timeout_seconds:.1f} s")
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            try:
                channel = SocketChannel(cancellation, peer, sock)
            except OSError as error:  # the peer is gone already
                return ChannelError(describe(error))
            stack.pop_all()
            return channel
    if code == errno.EAGAIN:
        return ChannelError(f"nobody accepted the connection in {timeout_seconds:.1f} s")
    reason = os.strerror(code).lower()
    return ConnectionRefused(reason) if code in (errno.ECONNREFUSED, errno.ENOENT) else ChannelError(reason)


def _host(address: object) -> str:
    return str(address[0] if isinstance(address, tuple) else address)


class Listener(Closing):
    """A listening socket.

    :param on_close: called right before the socket is closed
    :ivar uri: where it listens, the port filled in: connect to this
    """

    def __init__(self, sock: socket.socket, uri: str, on_close: Callable[[], None] = lambda: None) -> None:
        self.uri = uri
        self._socket = sock
        self._on_close = on_close
        self._closed = False

    def accept(self, cancellation: Cancellation, channel_cancellation: Cancellation) -> SocketChannel:
        """Wait for a peer.

        :param cancellation: ends the wait
        :param channel_cancellation: what the new channel's own waits watch
        What concerns one connection, or passes, as a lack of descriptors does, is waited out: whoever asks
        here is to get an answer.

        :raise Cancelled: When `cancellation` is set.
        :raise ChannelError: When the listening socket fails for good.
        """
        pause = _PAUSE_SECONDS
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(cancellation.fileno(), select.POLLIN)
        while True:
            poll.poll()
            cancellation.check()
            try:
                sock, address = self._socket.accept()
            except BlockingIOError:  # the peer gave up between the poll and the accept
                continue
            except OSError as error:
                if error.errno not in _PASSING:
                    raise ChannelError(f"accepting on {self.uri}: {describe(error)}") from error
                cancellation.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            try:
                return SocketChannel(channel_cancellation, _peer_name(sock, address, self.uri), sock)
            except OSError:  # the peer is gone already
                sock.close()

    @property
    def pending(self) -> bool:
        """Whether a peer has connected that was not accepted yet."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Stop listening."""
        if not self._closed:
            self._closed = True
            self._on_close()
            self._socket.close()


def _peer_name(sock: socket.socket, address: object, uri: str) -> str:
    if sock.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
        return f"tcp:{InetAddress(address[0], address[1])}"
    return f"the peer on {uri}"
