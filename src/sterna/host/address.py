"""Addresses of stream sockets as people write them, and sockets that listen there: ``HOST:PORT`` and paths."""

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass

from sterna.host.errors import HostError
from sterna.host.lookup import Address
from sterna.host.socketpath import SocketPath

_PATH_MAX = 107
"""Bytes in sockaddr_un.sun_path without the final zero."""


class AddressError(HostError, ValueError):
    """A text is no address. It says what is wrong, for whoever names the text and the form that was expected."""


@dataclass(frozen=True)
class InetAddress:
    """:ivar host: a name or a numeric address without brackets; empty is the loopback address"""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_inet(text: str) -> InetAddress:
    """``HOST:PORT``, where an IPv6 address is in brackets and the host may be left out.

    :raise AddressError: When host or port is malformed.
    """
    if text.startswith("["):
        host, bracket, tail = text[1:].partition("]")
        if not bracket or not tail.startswith(":"):
            raise AddressError("an IPv6 address is written [ADDRESS]:PORT")
        port = tail[1:]
    else:
        host, colon, port = text.rpartition(":")
        if not colon:
            raise AddressError("the port is missing")
        if ":" in host:
            raise AddressError("an IPv6 address needs brackets, [ADDRESS]:PORT")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise AddressError(f"port {port[:40]!r} is not a number from 0 to 65535")
    return InetAddress(host, int(port))


def parse_path(text: str) -> str:
    """The path of a Unix socket.

    :raise AddressError: When it is empty, too long for a socket address, or holds a zero byte.
    """
    if not text:
        raise AddressError("the path is missing")
    if "\0" in text:
        raise AddressError("the path holds a zero byte")
    if len(os.fsencode(text)) > _PATH_MAX:
        raise AddressError(f"the path is longer than {_PATH_MAX} bytes")
    return text


def listen_inet(address: Address, backlog: int, *, both: bool = False) -> socket.socket:
    """A socket that listens at an address.

    :param both: at IPv6's address of everywhere, take IPv4 too; else exactly what was named is bound
    :raise OSError: When the address is taken, or is none of this host's.
    """
    family, target = address
    with ExitStack() as opened:
        listener = opened.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        listener.bind(target)  # type: ignore[arg-type]
        listener.listen(backlog)
        opened.pop_all()
    return listener


def listen_path(path: str, backlog: int) -> tuple[socket.socket, SocketPath]:
    """A socket that listens at a path, and the path, which is to be removed with it.

    :raise OSError: When the path is taken, or cannot be made.
    """
    with ExitStack() as opened:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX))
        bound = SocketPath.bind(listener, path)
        listener.listen(backlog)
        opened.pop_all()
    return listener, bound
