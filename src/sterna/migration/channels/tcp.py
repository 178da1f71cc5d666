"""`tcp:HOST:PORT`: IPv4, IPv6 in brackets, or a name. A host left out is this one (loopback)."""

from dataclasses import dataclass, replace

from sterna.host.address import AddressError, InetAddress, listen_inet, parse_inet
from sterna.host.lookup import LOOKUP_SECONDS, Address, look_up
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import describe
from sterna.migration.channels.sockets import BACKLOG, CONNECT_SECONDS, Listener, SocketChannel
from sterna.migration.channels.sockets import connect as connect_socket
from sterna.migration.errors import ChannelError, UriError

FORM = "tcp:HOST:PORT"
_EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class TcpUri(InetAddress):
    """A port that listens, or is to."""

    def __str__(self) -> str:
        return f"tcp:{super().__str__()}"

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
        address = self._addresses(LOOKUP_SECONDS, passive=True)[0]
        try:
            sock = listen_inet(address, BACKLOG)
        except OSError as error:
            raise ChannelError(f"cannot listen on {self}: {describe(error)}") from error
        sock.setblocking(False)
        return Listener(sock, str(TcpUri(self.host, sock.getsockname()[1])))


def parse(rest: str) -> TcpUri:
    """Parse what follows `tcp:`.

    :raise UriError: When host or port is malformed.
    """
    try:
        address = parse_inet(rest)
    except AddressError as error:
        raise UriError(f"tcp:{rest}: {error}; expected {FORM}") from error
    return TcpUri(address.host, address.port)
