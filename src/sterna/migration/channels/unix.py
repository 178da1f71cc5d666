"""`unix:PATH`: a stream socket in the file system."""

import os
import socket
from dataclasses import dataclass

from sterna.host.address import AddressError, listen_path, parse_path
from sterna.host.socketpath import what_is_no_socket
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import describe
from sterna.migration.channels.sockets import BACKLOG, CONNECT_SECONDS, Listener, SocketChannel
from sterna.migration.channels.sockets import connect as connect_socket
from sterna.migration.errors import ChannelError, UriError

FORM = "unix:PATH"


@dataclass(frozen=True)
class UnixUri:
    """:ivar path: of the socket, at most 107 bytes"""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def connect(self, cancellation: Cancellation, timeout_seconds: float = CONNECT_SECONDS) -> SocketChannel:
        """
        :raise ConnectionRefused: When nobody listens there.
        :raise ChannelError: When something else than a socket is there.
        """
        if (reason := what_is_no_socket(self.path)) is not None:
            raise ChannelError(f"cannot connect to {self}: {reason}")
        return connect_socket([(socket.AF_UNIX, self.path)], str(self), cancellation, timeout_seconds)

    def serves(self, other: object) -> bool:
        """Whether whoever connects to `other` comes to the one that listens here."""
        return isinstance(other, UnixUri) and os.path.realpath(other.path) == os.path.realpath(self.path)

    def listen(self) -> Listener:
        """
        :raise ChannelError: When the path cannot be bound, or somebody listens there already.
        """
        try:
            sock, bound = listen_path(self.path, BACKLOG)
        except OSError as error:
            raise ChannelError(f"cannot listen on {self}: {describe(error)}") from error
        sock.setblocking(False)
        return Listener(sock, str(self), bound.remove)


def parse(rest: str) -> UnixUri:
    """Parse what follows `unix:`.

    :raise UriError: When the path is empty, too long for a socket address, or holds a zero byte.
    """
    try:
        return UnixUri(parse_path(rest))
    except AddressError as error:
        raise UriError(f"unix: {error}; expected {FORM}") from error
