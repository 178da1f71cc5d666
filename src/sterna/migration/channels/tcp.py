"""`tcp:HOST:PORT`: IPv4, IPv6 in brackets, or a name. A host left out is this one (loopback)."""

import socket
from dataclasses import dataclass, replace

from sterna.host.lookup import LOOKUP_SECONDS, Address, look_up
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import describe
from sterna.migration.channels.sockets import BACKLOG, CONNECT_SECONDS, Listener, SocketChannel
from sterna.migration.channels.sockets import connect as connect_socket
from sterna.migration.errors import ChannelError, UriError

FORM = "tcp:HOST:PORT"
_EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class TcpUri:
    """:ivar host: a name or a numeric address without brackets; empty is the loopback address"""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"

    def _addresses(self, seconds: float, *, passive: bool = False, cancel_fd: int = -1) -> list[Address]:
        host = self.host or "127.0.0.1"
        try:
            return look_up(host, self.port, passive=passive, cancel_fd=cancel_fd, seconds=seconds)
        except OSError as error:
            raise ChannelError(f"{self}: cannot find host {self.host!r}: {error}") from error

    def connect(self, cancellation: Cancellation, timeout_seconds: float = CONNECT_SECONDS) -> SocketChannel:
        """
        :raise ConnectionRefused: When nobody listens there.
        :raise ChannelError: When the host is unknown or does not answer.
        :raise Cancelled: When the migration is cancelled while it waits.
        """
        try:
            seconds = min(LOOKUP_SECONDS, timeout_seconds)
            addresses = self._addresses(seconds, cancel_fd=cancellation.fileno())
        except ChannelError:
            cancellation.check()
            raise
        return connect_socket(addresses, str(self), cancellation, timeout_seconds)

    def serves(self, other: object) -> bool:
        """Whether whoever connects to `other` comes to the one that listens here."""
        if not isinstance(other, TcpUri) or other.port != self.port:
            return False
        try:
            here = self._addresses(LOOKUP_SECONDS, passive=True)[0]
            if here in (others := other._addresses(LOOKUP_SECONDS)):
                return True
            if self.host not in _EVERYWHERE or here[0] != others[0][0]:
                return False
            # Everywhere is each address of this machine's: those that can be bound.
            replace(other, port=0).listen().close()
        except ChannelError:
            return False  # a host that is not known is told by whoever listens or connects
        return True

    def listen(self) -> Listener:
        """
        :raise ChannelError: When the host is unknown or the port is taken.
        """
        family, address = self._addresses(LOOKUP_SECONDS, passive=True)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # Bind exactly what the user named, not IPv4 beside it.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)  # type: ignore[arg-type]
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            raise ChannelError(f"cannot listen on {self}: {describe(error)}") from error
        return Listener(sock, str(TcpUri(self.host, sock.getsockname()[1])))


def parse(rest: str) -> TcpUri:
    """Parse what follows `tcp:`.

    :raise UriError: When host or port is malformed.
    """
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or not tail.startswith(":"):
            raise UriError(f"tcp:{rest}: an IPv6 address is written [ADDRESS]:PORT; expected {FORM}")
        port = tail[1:]
    else:
        host, colon, port = rest.rpartition(":")
        if not colon:
            raise UriError(f"tcp:{rest}: the port is missing; expected {FORM}")
        if ":" in host:
            raise UriError(f"tcp:{rest}: an IPv6 address needs brackets; expected tcp:[ADDRESS]:PORT")
    if not (port.isascii() and port.isdigit() and int(port[:6]) <= 65535 and len(port) <= 5):
        raise UriError(f"tcp:{rest}: port {port!r} is not a number from 0 to 65535; expected {FORM}")
    return TcpUri(host, int(port))
