"""The way between the two ends: it acts at a placed byte, and what answers at its address can be exchanged."""

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from sterna.migration.handshake import Nack, PrivateMessage, decode
from sterna.stream.wire import StreamError


class Address(Enum):
    """What the listening address does from the fault on."""

    NOTHING = "as before"
    REFUSES = "refuses"
    GONE = "socket file gone"
    MUTE = "never answers"
    RESETS = "resets"
    SECOND = "another sterna"
    GARBAGE = "garbage"


class Mode(Enum):
    """What becomes of the migration's connection."""

    GO_ON = "goes on"
    CUT = "cut"
    RESET = "reset"
    HALF_FORWARD = "shut towards the destination"
    HALF_BACK = "shut towards the source"
    SILENT_FORWARD = "lost towards the destination"
    SILENT_BACK = "lost towards the source"


class Direction(Enum):
    FORWARD = 0
    BACK = 1
    AFTER_READY = 2
    """Forward, counted from where READY has been passed on."""


class Place(NamedTuple):
    """After so many bytes, or at the end if there are not so many."""

    direction: Direction
    at: int


GARBAGE = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + bytes(range(256))
_RST = b"\1\0\0\0\0\0\0\0"


def connect(uri: str) -> socket.socket:
    """
    :param uri: ``tcp:HOST:PORT`` or ``unix:PATH``
    """
    kind, _, rest = uri.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(rest)
        except OSError:
            sock.close()
            raise
        return sock
    host, _, port = rest.rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class ReturnPath:
    """What has been passed on to the source."""

    def __init__(self) -> None:
        self._pending = b""
        self.types: list[int] = []
        self.abandoned = False

    def feed(self, data: bytes) -> None:
        self._pending += data
        while len(self._pending) >= 4:
            size = 4 + int.from_bytes(self._pending[2:4], "big")
            if len(self._pending) < size:
                return
            kind, payload = int.from_bytes(self._pending[:2], "big"), self._pending[4:size]
            self._pending = self._pending[size:]
            self.types.append(kind)
            if kind == PrivateMessage.NACK:
                with suppress(StreamError):
                    self.abandoned = bool(decode(payload, Nack).abandoned)

    @property
    def ready(self) -> bool:
        return PrivateMessage.READY in self.types

    @property
    def running(self) -> bool:
        return PrivateMessage.RUNNING in self.types

    @property
    def tells(self) -> bool:
        """Whether the source has been told who runs the guest."""
        return self.running or self.abandoned


class Relay:
    """Forwards connections to `target`; the first is the migration's.

    :param act: called once, at the place, before anything that comes behind it is passed on
    :ivar forwarded: bytes of the migration's connection to the destination, and back
    :ivar after_ready: bytes passed on to the destination since READY
    """

    def __init__(
        self, folder: Path, unix: bool, target: str, second: str, place: Place | None, act: Callable[[], Mode]
    ) -> None:
        self._target, self._second = target, second
        self._place, self._act = place, act
        self._path = folder / "relay" if unix else None
        if self._path is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self._path))
            self._listener.listen(64)
            self.uri = f"unix:{self._path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
            self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._stop_read, self._stop_write = socket.socketpair()
        self._wake_read, self._wake_write = socket.socketpair()
        self._held: list[socket.socket] = []
        self._address = Address.NOTHING
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._mode = Mode.GO_ON
        self.forwarded = [0, 0]
        self.after_ready = 0
        self._committing = b""
        self.returned = ReturnPath()
        self.acted = False
        self._listening = True
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def told(self) -> bool:
        """Whether the source has been told who runs the guest; what it acts upon already counts."""
        with self._telling:
            return self.returned.tells

    @property
    def committed(self) -> bool:
        """Whether all of COMMIT has been passed on: the section's type, the command's, its length, its payload."""
        data = self._committing
        return len(data) >= 5 and len(data) >= 5 + int.from_bytes(data[3:5], "big")

    # -- the address -----------------------------------------------------------------------------------------

    def set_address(self, address: Address) -> None:
        """What is at the address from now on. It is so when this returns."""
        with self._lock:
            self._address = address
            if address is Address.REFUSES:
                # It refuses from here on, and the thread that looks at it wakes up; closing would wait for that.
                self._listening = False
                self._listener.shutdown(socket.SHUT_RDWR)
            elif address is Address.GONE:
                assert self._path is not None
                self._path.unlink()

    def _accept(self) -> None:
        first = True
        while True:
            ready, _, _ = select.select([self._listener, self._stop_read], [], [])
            with self._lock:
                if self._stop_read in ready or not self._listening:
                    return
                near, _ = self._listener.accept()
                address = self._address
                if address is Address.MUTE:
                    self._held.append(near)
                    continue
            if address is Address.RESETS:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
                near.close()
                continue
            target: Callable[..., None] = self._forward
            arguments: tuple[object, ...] = (
                near,
                self._second if address is Address.SECOND else self._target,
                first,
            )
            if address is Address.GARBAGE:
                target, arguments = self._babble, (near,)
            first = False
            thread = threading.Thread(target=target, args=arguments, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _babble(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            near.settimeout(5)
            near.recv(1 << 12)
            near.sendall(GARBAGE)
            near.shutdown(socket.SHUT_WR)
            while near.recv(1 << 12):
                pass

    # -- the connections -------------------------------------------------------------------------------------

    def interrupt(self, mode: Mode) -> None:
        """Do that to the migration's connection, from another thread: there is no place then."""
        self._mode = mode
        self._wake_write.send(b"x")

    def _fault(self) -> None:
        if self._place is not None and not self.acted:
            self.acted = True
            self._mode = self._act()

    def _left(self, direction: int) -> int:
        """Bytes that may be passed on before the place."""
        if self._place is None or self.acted:
            return 1 << 16
        where, at = self._place
        if where is Direction.AFTER_READY:
            return at - self.after_ready if direction == 0 and self.returned.ready else 1 << 16
        return at - self.forwarded[direction] if where.value == direction else 1 << 16

    def _forward(self, near: socket.socket, target: str, migration: bool) -> None:
        with near:
            try:
                far = connect(target)
            except OSError:
                return
            with far:
                if migration:
                    with suppress(OSError):
                        self._migrate(near, far)
                    self._fault()
                    if self._mode is Mode.RESET:
                        for sock in (near, far):
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
                else:
                    with suppress(OSError):
                        self._pass(near, far)

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        ends = {near: far, far: near}
        open_ends = [near, far]
        while open_ends:
            ready, _, _ = select.select([*open_ends, self._stop_read], [], [])
            if self._stop_read in ready:
                return
            for source in ready:
                data = source.recv(1 << 16)
                ends[source].sendall(data)
                if not data:
                    open_ends.remove(source)
                    ends[source].shutdown(socket.SHUT_WR)

    def _migrate(self, near: socket.socket, far: socket.socket) -> None:
        ends = ((near, far), (far, near))
        open_ends = {0, 1}
        mode = Mode.GO_ON
        while open_ends:
            if any(self._left(direction) <= 0 for direction in (0, 1)):
                self._fault()
            if mode is not self._mode:
                mode = self._mode
                if mode in (Mode.CUT, Mode.RESET):
                    return
                if mode in (Mode.HALF_FORWARD, Mode.HALF_BACK):
                    ends[int(mode is Mode.HALF_BACK)][1].shutdown(socket.SHUT_WR)
            readers = [ends[direction][0] for direction in sorted(open_ends)]
            ready, _, _ = select.select([*readers, self._stop_read, self._wake_read], [], [])
            if self._stop_read in ready:
                return
            if self._wake_read in ready:
                self._wake_read.recv(16)
                continue
            for direction in sorted(open_ends):
                source, sink = ends[direction]
                if source not in ready or self._left(direction) <= 0 or mode is not self._mode:
                    continue
                try:
                    data = source.recv(min(1 << 16, self._left(direction)))
                    lost = (
                        mode
                        in (
                            (Mode.HALF_FORWARD, Mode.SILENT_FORWARD),
                            (Mode.HALF_BACK, Mode.SILENT_BACK),
                        )[direction]
                    )
                    if lost and data:
                        continue
                    if not lost:
                        self._pass_on(direction, sink, data)
                    if not data:
                        open_ends.discard(direction)
                        if mode not in (Mode.HALF_FORWARD, Mode.HALF_BACK) or not lost:
                            sink.shutdown(socket.SHUT_WR)
                        if direction == 0 and mode is not Mode.GO_ON:
                            return  # the source has closed it, and what is lost will not come
                except OSError:
                    # One end is gone: the last words of the other still arrive, if they may.
                    if not (direction == 0 and mode in (Mode.SILENT_BACK, Mode.HALF_BACK)):
                        self._last_words(ends[1])
                    return
                if direction == 0 and self.returned.ready:
                    self.after_ready += len(data)
                    self._committing += data
                if direction == 0:
                    self.forwarded[0] += len(data)

    def _pass_on(self, direction: int, sink: socket.socket, data: bytes) -> None:
        if direction == 0:
            sink.sendall(data)
            return
        with self._telling:
            sink.sendall(data)
            self.forwarded[1] += len(data)
            self.returned.feed(data)

    def settle(self, seconds: float) -> bool:
        """Wait until all is passed on that the migration's connection will bring; one of its ends is gone.

        :return: False when that took too long
        """
        if len(self._threads) > 1:  # the first accepts
            self._threads[1].join(seconds)
            return not self._threads[1].is_alive()
        return True

    def _last_words(self, end: tuple[socket.socket, socket.socket]) -> None:
        source, sink = end
        source.setblocking(False)
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._pass_on(1, sink, data)

    def close(self) -> None:
        self._stop_write.close()
        for thread in self._threads:
            thread.join()
        for sock in (
            *self._held,
            self._listener,
            self._stop_read,
            self._wake_read,
            self._wake_write,
        ):
            sock.close()

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
