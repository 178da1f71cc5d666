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
from types import TracebackType

from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel, describe
from sterna.migration.errors import ChannelError, ConnectionRefused

_LINGER_SECONDS = 2.0


class SocketChannel(Channel):
    """A connected stream socket."""

    def __init__(self, cancellation: Cancellation, peer: str, sock: socket.socket) -> None:
        super().__init__(cancellation, peer, read_fd=sock.fileno(), write_fd=sock.fileno(), owner=sock)
        self._socket = sock
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A host that vanished is noticed within half a minute, also when this side only waits.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)

    def unsent_bytes(self) -> int:
        """Bytes that were written and that the peer's host has not acknowledged yet (SIOCOUTQ)."""
        answer = bytearray(4)
        try:
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, answer)
        except OSError:
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def end_writing(self) -> None:
        """Shut down this side's direction: the peer reads to the end of what was written."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:  # the connection is gone already
            pass

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
    attempts: list[tuple[socket.AddressFamily, object]],
    peer: str,
    cancellation: Cancellation,
    timeout_seconds: float | None = None,
) -> SocketChannel:
    """Connect to the first address that answers.

    :param timeout_seconds: for each address; the operating system's if not given
    :raise ConnectionRefused: When nobody listens there.
    :raise ChannelError: When no address answers; the text gives the last one's reason.
    :raise Cancelled: When the migration is cancelled while it waits.
    """
    code = errno.EADDRNOTAVAIL
    for family, address in attempts:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            try:
                code = sock.connect_ex(address)  # type: ignore[arg-type]
            except (OSError, ValueError, OverflowError) as error:
                raise ChannelError(f"cannot connect to {peer}: {error}") from error
            if code in (errno.EINPROGRESS, errno.EAGAIN):
                poll = select.poll()
                poll.register(sock, select.POLLOUT)
                poll.register(cancellation.fileno(), select.POLLIN)
                ready = poll.poll(None if timeout_seconds is None else timeout_seconds * 1000)
                cancellation.check()
                if not ready:
                    raise ChannelError(f"cannot connect to {peer}: no answer in {timeout_seconds:.1f} s")
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code == 0:
                return SocketChannel(cancellation, peer, sock)
        except BaseException:
            sock.close()
            raise
        sock.close()
    if code in (errno.ECONNREFUSED, errno.ENOENT):
        raise ConnectionRefused(f"connection refused by {peer}: nobody listens there")
    raise ChannelError(f"cannot connect to {peer}: {os.strerror(code).lower()}")


class Listener:
    """A listening socket.

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
        :raise Cancelled: When `cancellation` is set.
        :raise ChannelError: When the listening socket fails.
        """
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
            except ConnectionAbortedError:
                continue
            except OSError as error:
                raise ChannelError(f"accepting on {self.uri}: {describe(error)}") from error
            return SocketChannel(channel_cancellation, _peer_name(sock, address, self.uri), sock)

    def close(self) -> None:
        """Stop listening."""
        if not self._closed:
            self._closed = True
            self._socket.close()
            self._on_close()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _peer_name(sock: socket.socket, address: object, uri: str) -> str:
    if sock.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"tcp:{host}:{address[1]}"
    return f"the peer on {uri}"
