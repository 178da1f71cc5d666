"""`fd:N`: a descriptor that this process inherited. A socket works both ways, anything else one way."""

import fcntl
import os
import socket
from dataclasses import dataclass
from functools import partialmethod

from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel, describe, is_socket
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.errors import ChannelError, UriError

FORM = "fd:NUMBER"


@dataclass(frozen=True)
class FdUri:
    """:ivar fd: number of the open descriptor; the channel owns a duplicate"""

    fd: int

    def __str__(self) -> str:
        return f"fd:{self.fd}"

    def _open(self, cancellation: Cancellation, *, write: bool) -> Channel:
        """
        :raise ChannelError: When no such descriptor is open, or only for the other direction.
        """
        try:
            fd = os.dup(self.fd)
        except (OSError, OverflowError) as error:
            raise ChannelError(f"{self} cannot be used: {describe(error)}") from error
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == (os.O_RDONLY if write else os.O_WRONLY):
            os.close(fd)
            raise ChannelError(
                f"{self} cannot be used: it is open for {'reading' if write else 'writing'} only"
            )
        if is_socket(fd):
            return SocketChannel(cancellation, str(self), socket.socket(fileno=fd))
        if write:
            return Channel(cancellation, str(self), write_fd=fd)
        return Channel(cancellation, str(self), read_fd=fd)

    connect = partialmethod(_open, write=True)
    open_incoming = partialmethod(_open, write=False)


def parse(rest: str) -> FdUri:
    """Parse what follows `fd:`.

    :raise UriError: When it is not a number.
    """
    if not (rest.isascii() and rest.isdigit() and len(rest) <= 9):
        raise UriError(f"fd:{rest}: {rest!r} is not the number of a descriptor; expected {FORM}")
    return FdUri(int(rest))
