"""Serial lines: where a UART's bytes go, and where its input comes from."""

import logging
import os
import select
import socket
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from sterna.host.address import listen_path
from sterna.machine.errors import MachineError

log = logging.getLogger(__name__)

_CHUNK = 4096
_OUTPUT_LIMIT = 1 << 20
_WRITE_PATIENCE_MS = 100
_LAST_WRITE_S = 10.0
"""For a terminal that is stopped. So long no busy machine keeps the thread that writes from it, whose output would be lost."""
_BACKLOG = 1


class SerialError(MachineError):
    """A serial line cannot be opened; the text names it and why."""


Receive = Callable[[bytes], None]
"""Takes input for the UART; what does not fit its FIFO waits in the UART."""


class SerialBackend(Protocol):
    """The far end of a serial line."""

    def write(self, data: bytes) -> None:
        """Send what the guest wrote. Never blocks for long and never raises: a UART has nobody to tell."""
        ...

    def start(self, receive: Receive) -> None:
        """Hand input to `receive` from now on, from any thread."""
        ...

    def close(self) -> None:
        """Close the line; no input is handed on once it returns."""
        ...


class NullSerial:
    """A line that is not connected."""

    def write(self, data: bytes) -> None:
        """Drop it."""

    def start(self, receive: Receive) -> None:
        """There is no input."""

    def close(self) -> None:
        """Nothing to close."""


class MemorySerial:
    """A line that keeps what the guest wrote.

    :ivar output: all of it
    """

    def __init__(self) -> None:
        self.output = bytearray()
        self._changed = threading.Condition()
        self._receive: Receive | None = None

    def write(self, data: bytes) -> None:
        """Keep it, and wake `wait_for`."""
        with self._changed:
            self.output += data
            self._changed.notify_all()

    def wait_for(self, text: bytes, timeout_s: float, start: int = 0) -> bool:
        """Wait until the guest has written `text`, at byte `start` of the output or later.

        :return: whether it did before the time was over
        """
        with self._changed:
            return self._changed.wait_for(lambda: self.output.find(text, start) >= 0, timeout_s)

    def send(self, data: bytes) -> None:
        """Input for the guest."""
        if self._receive is not None:
            self._receive(data)

    def start(self, receive: Receive) -> None:
        """Hand what `send` takes to `receive`."""
        self._receive = receive

    def close(self) -> None:
        """Stop handing on input; the output stays."""
        self._receive = None


class DescriptorSerial:
    """A line on file descriptors: standard input and output, or a file.

    :param name: as its user says it
    :param owned: the output is closed with the line, or when there can be none
    :raise RuntimeError: When the host has no thread to spare.
    """

    def __init__(self, name: str, output: int, input: int | None, *, owned: bool) -> None:
        self._name = name
        self._output = output
        self._changed = threading.Condition()
        self._unwritten = bytearray()
        self._closed = False
        self._input = input
        self._owned = owned
        self._thread: threading.Thread | None = None
        with ExitStack() as opened:
            if owned:
                opened.callback(os.close, output)
            self._stop_read, self._stop_write = _pipe(opened)
            self._writer = threading.Thread(target=self._write, name="serial-out", daemon=True)
            self._writer.start()
            self._opened = opened.pop_all()

    def write(self, data: bytes) -> None:
        """Write it soon. The guest does not wait for whoever reads: past 1 MiB of waiting output more is lost, as on a wire."""
        with self._changed:
            self._unwritten += data[: _OUTPUT_LIMIT - len(self._unwritten)]
            self._changed.notify()

    def _write(self) -> None:
        writable = select.poll()
        writable.register(self._output, select.POLLOUT)
        stop = select.poll()
        stop.register(self._stop_read, select.POLLIN)
        told = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten or self._closed)
                data = bytes(self._unwritten[:_CHUNK])
                if not data:
                    return
            # A write of at most PIPE_BUF bytes to a pipe that polls as writable does not block (POSIX, write).
            if not writable.poll(_WRITE_PATIENCE_MS):
                if stop.poll(0):
                    return
                continue
            try:
                written = os.write(self._output, data)
            except OSError as error:  # a closed pipe, a full disk
                written = len(data)
                if not told:
                    told = True
                    log.warning("serial %s: what the guest writes is lost: %s", self._name, error.strerror)
            with self._changed:
                del self._unwritten[:written]
                self._changed.notify_all()

    def start(self, receive: Receive) -> None:
        """Read the input on a thread of its own. A file of ours is emptied: the machine is there, and another guest's output
        is of no more use.
        """
        if self._owned and stat.S_ISREG(os.fstat(self._output).st_mode):
            os.ftruncate(self._output, 0)
        if self._input is not None:
            thread = threading.Thread(target=self._read, args=(receive,), name="serial", daemon=True)
            thread.start()
            self._thread = thread

    def _read(self, receive: Receive) -> None:
        assert self._input is not None
        while True:
            try:
                ready, _, _ = select.select([self._input, self._stop_read], [], [])
                data = b"" if self._stop_read in ready else os.read(self._input, _CHUNK)
            except OSError:
                return
            if not data:
                return
            receive(data)

    def close(self) -> None:
        """End the reading thread and close what is ours."""
        os.write(self._stop_write, b"x")
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # A terminal that is stopped may hold the last write for ever.
        self._writer.join(_LAST_WRITE_S)
        self._opened.close()


def _pipe(opened: ExitStack) -> tuple[int, int]:
    """Both ends of a pipe, which are closed with `opened`."""
    ends = os.pipe()
    for end in ends:
        opened.callback(os.close, end)
    return ends


class UnixSerial:
    """A line on a Unix socket: listens at `path`, one peer at a time. What the guest writes with no peer is lost."""

    def __init__(self, path: Path) -> None:
        self._peer: socket.socket | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        with ExitStack() as opened:
            try:
                self._stop_read, self._stop_write = _pipe(opened)
                self._listener, bound = listen_path(str(path), _BACKLOG)
                opened.enter_context(self._listener)
                opened.callback(bound.remove)
            except OSError as error:
                raise SerialError(f"serial unix:{path}: {error.strerror or error}") from error
            self._opened = opened.pop_all()

    def write(self, data: bytes) -> None:
        """Send it to the peer; a peer that does not read loses bytes and never holds up the guest."""
        with self._lock:
            if self._peer is None:
                return
            try:
                self._peer.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                pass

    def start(self, receive: Receive) -> None:
        """Serve peers on a thread of its own."""
        thread = threading.Thread(target=self._serve, args=(receive,), name="serial", daemon=True)
        thread.start()
        self._thread = thread

    def _serve(self, receive: Receive) -> None:
        while True:
            with self._lock:
                source = self._peer or self._listener
            ready, _, _ = select.select([source.fileno(), self._stop_read], [], [])
            if self._stop_read in ready:
                return
            if source is self._listener:
                try:
                    peer, _ = self._listener.accept()
                except OSError:
                    continue
                with self._lock:
                    self._peer = peer
                continue
            try:
                data = source.recv(_CHUNK)
            except OSError:
                data = b""
            if data:
                receive(data)
            else:
                self._drop_peer()

    def _drop_peer(self) -> None:
        with self._lock:
            if self._peer is not None:
                self._peer.close()
                self._peer = None

    def close(self) -> None:
        """End the thread, close the sockets and remove the path."""
        os.write(self._stop_write, b"x")
        if self._thread is not None:
            self._thread.join()
        self._drop_peer()
        self._opened.close()


def check_serial(text: str) -> None:
    """Check that a setting names a line: ``stdio``, ``file:PATH``, ``unix:PATH``, ``memory`` or ``null``.

    :raise SerialError: When it does not.
    """
    kind, path = _split(text)
    if kind in ("file", "unix"):
        if not path:
            raise SerialError(f"serial {text!r}: the path is missing")
    elif text not in ("stdio", "memory", "null", "none"):
        raise SerialError(f"serial {text!r} is not known; choose stdio, file:PATH, unix:PATH or null")


def _split(text: str) -> tuple[str, str]:
    """A setting's kind, and what follows; of a socket only the path: it always listens, and never waits."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        rest = rest.removesuffix(",server=on,wait=off").removesuffix(",server")
    return kind, rest


def open_serial(text: str) -> SerialBackend:
    """The line that a setting names, as `check_serial` has it.

    :raise SerialError: When the setting is not known or the line cannot be opened.
    """
    check_serial(text)
    if text in ("null", "none"):
        return NullSerial()
    if text == "memory":
        return MemorySerial()
    if text == "stdio":
        sys.stdout.flush()
        return DescriptorSerial(text, 1, 0, owned=False)
    kind, path = _split(text)
    if kind == "unix":
        return UnixSerial(Path(path))
    try:
        # A pipe that nobody reads is refused here (ENXIO), not waited for.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
    except (OSError, ValueError) as error:
        raise SerialError(f"serial {text!r}: {getattr(error, 'strerror', None) or error}") from error
    os.set_blocking(descriptor, True)
    return DescriptorSerial(text, descriptor, None, owned=True)
