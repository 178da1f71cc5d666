"""Addresses of a monitor, in QEMU's notation: ``unix:PATH,server,wait=off``, ``tcp:HOST:PORT,server``,
``fd:N``.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sterna.host import address as sockets
from sterna.host.address import InetAddress, listen_inet, listen_path, parse_inet, parse_path
from sterna.host.lookup import look_up
from sterna.host.socketpath import SocketPath, what_is_no_socket
from sterna.monitor.protocol import QmpError


class AddressError(QmpError):
    """A monitor's address is malformed, or cannot be listened on or connected to; one line."""


_FORMS = "unix:PATH[,server], tcp:HOST:PORT[,server] or fd:NUMBER"
_OPTIONS = {"server", "server=on", "nowait", "wait=off", "wait=on"}
_BACKLOG = 16
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class MonitorAddress:
    """Where a QMP server listens.

    :ivar kind: ``unix``, ``tcp`` or ``fd``
    :ivar path: of a unix socket
    :ivar host: numeric address or name; empty is the loopback address
    :ivar fd: an open listening socket that this process inherited
    """

    kind: str
    path: str = ""
    host: str = ""
    port: int = 0
    fd: int = -1

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd:{self.fd}"
        return f"tcp:{InetAddress(self.host, self.port)}"


def parse_address(text: str) -> MonitorAddress:
    """
    :raise AddressError: When it is malformed; it says what was expected.
    """
    kind, colon, rest = text.partition(":")
    shown = repr(text[:100])
    if not colon or kind not in ("unix", "tcp", "fd"):
        raise AddressError(f"{shown} is not a monitor address; expected {_FORMS}")
    target, *options = rest.split(",")
    for option in options:
        if option not in _OPTIONS:
            raise AddressError(f"{shown}: unknown option {option[:40]!r}; expected 'server' and 'wait=off'")
    if "wait=on" in options:
        raise AddressError(
            f"{shown}: 'wait=on' is not supported; the guest starts without waiting for a client"
        )
    if kind == "unix":
        return MonitorAddress("unix", path=_parsed(parse_path, target, shown))
    if kind == "fd":
        if not (target.isascii() and target.isdigit() and len(target) < 8):
            raise AddressError(f"{shown}: {target[:40]!r} is not the number of a descriptor")
        return MonitorAddress("fd", fd=int(target))
    inet = _parsed(parse_inet, target, shown)
    return MonitorAddress("tcp", host=inet.host or "127.0.0.1", port=inet.port)


def _parsed(parse: Callable[[str], Parsed], target: str, shown: str) -> Parsed:
    try:
        return parse(target)
    except sockets.AddressError as error:
        raise AddressError(f"{shown}: {error}; expected {_FORMS}") from error


@dataclass(frozen=True)
class Listening:
    """A bound socket, and its path if it has one."""

    socket: socket.socket
    path: SocketPath | None = None

    def close(self) -> None:
        if self.path is not None:
            self.path.remove()
        self.socket.close()


def listen(address: MonitorAddress) -> Listening:
    """A listening socket. A unix socket's file that nobody listens on any more is replaced.

    :raise AddressError: When the address is taken, or cannot be bound; it names the cause.
    """
    try:
        if address.kind == "fd":
            return Listening(_adopt(address))
        if address.kind == "unix":
            return Listening(*listen_path(address.path, _BACKLOG))
        found = look_up(address.host, address.port, passive=True)
        return Listening(listen_inet(found[0], _BACKLOG, both=True))
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {_cause(error)}") from error


def connect(address: MonitorAddress, timeout: float | None = None) -> socket.socket:
    """A connected socket.

    :param timeout: seconds for the connection, and for each later call on the socket
    :raise AddressError: When nobody listens there, the host is unknown, ...
    """
    try:
        if address.kind == "fd":
            return socket.socket(fileno=os.dup(address.fd))
        if address.kind == "unix":
            if (reason := what_is_no_socket(address.path)) is not None:
                raise AddressError(f"cannot connect to {address}: {reason}")
            return _connect(socket.AF_UNIX, address.path, timeout)
        *others, last = look_up(address.host, address.port)
        for family, target in others:
            try:
                return _connect(family, target, timeout)
            except OSError:
                continue
        return _connect(*last, timeout)
    except OSError as error:
        raise AddressError(f"cannot connect to {address}: {_cause(error)}") from error


def _connect(family: socket.AddressFamily, target: object, timeout: float | None) -> socket.socket:
    connection = socket.socket(family)
    try:
        connection.settimeout(timeout)
        connection.connect(target)  # type: ignore[arg-type]
    except BaseException:
        connection.close()
        raise
    return connection


def _adopt(address: MonitorAddress) -> socket.socket:
    listener = socket.socket(fileno=os.dup(address.fd))
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.close()
        raise AddressError(f"{address} is not a listening socket")
    return listener


def _cause(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)
