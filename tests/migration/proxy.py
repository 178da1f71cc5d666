"""A TCP proxy that cuts connections after so many bytes, or damages one."""

import select
import socket
import struct
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What happens to one connection, the first unless `victim` counts on.

    :ivar forward: cut after so many bytes from the connecting side
    :ivar backward: cut after so many bytes to it
    :ivar flip: damage the byte at this offset from the connecting side
    :ivar flip_back: damage the byte at this offset to it
    :ivar reset: cut with RST instead of FIN
    :ivar cut_message: cut before the last byte of the first message to the connecting side of this type (`PrivateMessage`)
    :ivar victim: how many connections are spared before it
    :ivar mute: take every later connection and never forward a byte of it
    """

    forward: int | None = None
    backward: int | None = None
    flip: int | None = None
    flip_back: int | None = None
    cut_message: int | None = None
    reset: bool = False
    mute: bool = False
    victim: int = 0


class _Messages:
    """Finds the end of a message in what comes back: type and length of two bytes each, and so much."""

    def __init__(self, kind: int) -> None:
        self._kind = kind
        self._kept = b""

    def end_in(self, data: bytes) -> int | None:
        """Where in these bytes is the last one of such a message."""
        before = len(self._kept)
        self._kept += data
        at = 0
        while len(self._kept) >= at + 4:
            kind, size = struct.unpack_from(">HH", self._kept, at)
            if len(self._kept) < at + 4 + size:
                break
            at += 4 + size
            if kind == self._kind:
                return at - 1 - before
        self._kept = self._kept[at:]
        return None


def _pass_on(gone: socket.socket, other: socket.socket) -> None:
    """Forward the last words of an end that takes nothing any more."""
    gone.setblocking(False)
    try:
        while data := gone.recv(1 << 16):
            other.sendall(data)
    except OSError:
        pass


class Proxy:
    """Forwards connections to `target` (port on the loopback address); one suffers the fault.

    :ivar forwarded: bytes of that connection, forward and backward
    """

    def __init__(self, target: int, fault: Fault = Fault()) -> None:
        self._target = target
        self._fault = fault
        self.forwarded = [0, 0]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._stop_read, self._stop_write = socket.socketpair()
        self._held: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def uri(self) -> str:
        return f"tcp:127.0.0.1:{self.port}"

    def _accept(self) -> None:
        accepted = 0
        while True:
            ready, _, _ = select.select([self._listener, self._stop_read], [], [])
            if self._stop_read in ready:
                return
            near, _ = self._listener.accept()
            accepted += 1
            if accepted > self._fault.victim + 1 and self._fault.mute:
                self._held.append(near)
                continue
            fault = self._fault if accepted == self._fault.victim + 1 else Fault()
            thread = threading.Thread(target=self._forward, args=(near, fault), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _forward(self, near: socket.socket, fault: Fault) -> None:
        limits = (fault.forward, fault.backward)
        flips = (fault.flip, fault.flip_back)
        messages = None if fault.cut_message is None else _Messages(fault.cut_message)
        faulty = fault != Fault()
        count = [0, 0]
        with near, socket.create_connection(("127.0.0.1", self._target)) as far:
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ends = {near: (0, far), far: (1, near)}
            open_ends = [near, far]
            cut = 0 in limits
            while open_ends and not cut:
                ready, _, _ = select.select([*open_ends, self._stop_read], [], [])
                if self._stop_read in ready:
                    break
                for source in ready:
                    direction, sink = ends[source]
                    limit = limits[direction]
                    try:
                        data = source.recv(
                            1 << 16 if limit is None else min(1 << 16, limit - count[direction])
                        )
                        flip = flips[direction]
                        if flip is not None and 0 <= flip - count[direction] < len(data):
                            at = flip - count[direction]
                            data = data[:at] + bytes((data[at] ^ 0x41,)) + data[at + 1 :]
                        end = messages.end_in(data) if messages is not None and direction == 1 else None
                        cut = cut or end is not None
                        sink.sendall(data[:end])
                        if not data:
                            open_ends.remove(source)
                            sink.shutdown(socket.SHUT_WR)
                    except OSError:
                        if not faulty:
                            _pass_on(sink, source)
                        cut = True
                        break
                    count[direction] += len(data)
                    if faulty or self._fault == Fault():
                        self.forwarded = list(count)
                    cut = cut or count[direction] == limit
            if fault.reset:
                for sock in (near, far):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def wait_end(self, seconds: float = 60.0) -> None:
        """Wait until what was forwarded is all that there will be: every connection until now has ended by itself."""
        for thread in self._threads[1:]:
            thread.join(seconds)
            assert not thread.is_alive(), f"a connection goes on after {self.forwarded} bytes"

    def close(self) -> None:
        self._stop_write.close()
        for thread in self._threads:
            thread.join()
        for sock in (*self._held, self._listener, self._stop_read):
            sock.close()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
