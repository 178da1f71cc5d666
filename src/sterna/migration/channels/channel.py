"""A channel: a byte stream to or from a peer, over any file descriptor.

Reads fill buffers in place, writes gather from wherever the bytes lie. Descriptors are non-blocking and every
wait also watches the cancellation, so that a peer which stops reading cannot hold a migration.
"""

import ctypes
import errno
import os
import select
import stat
import time
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.migration.cancellation import Cancellation
from sterna.migration.errors import ChannelError

Vectors = NDArray[np.uint64]
"""A gather list: `shape (n, 2)`, dtype uint64, C order; rows are (address, length in bytes), as struct iovec.
"""

IOV_MAX = 1024
"""Most vectors one writev takes (UIO_MAXIOV, include/uapi/linux/uio.h)."""

_libc = ctypes.CDLL(None, use_errno=True)
# ctypes releases the GIL around the call: other threads go on while the kernel copies.
_writev = _libc.writev
_writev.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_writev.restype = ctypes.c_ssize_t
_readv = _libc.readv
_readv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_readv.restype = ctypes.c_ssize_t


def vectors_of(data: bytes | bytearray | memoryview) -> Vectors:
    """A gather list of one piece, good as long as `data` is kept."""
    array = np.frombuffer(data, dtype=np.uint8)
    return np.array([[array.ctypes.data, array.size]], dtype=np.uint64)


def describe(error: OSError) -> str:
    """An operating system error's text in lower case, without the number."""
    return (error.strerror or str(error)).lower()


class Channel:
    """One open byte stream. Closing is idempotent; `with` closes it.

    :ivar peer: who is at the other end, as in the URI
    :ivar two_way: both directions work, so the peer can answer
    :ivar transferred: bytes written so far
    :ivar waited_seconds: how long writers have waited for the peer in all
    """

    def __init__(
        self,
        cancellation: Cancellation,
        peer: str,
        *,
        read_fd: int | None = None,
        write_fd: int | None = None,
        owner: Any = None,
    ) -> None:
        """
        :param owner: owns the descriptors (a socket) and is closed with the channel; without it they are
            closed
        """
        self.peer = peer
        self.transferred = 0
        self.waited_seconds = 0.0
        self._cancellation = cancellation
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._owner = owner
        self._closed = False
        for fd in {read_fd, write_fd} - {None}:
            assert fd is not None
            os.set_blocking(fd, False)

    @property
    def two_way(self) -> bool:
        return self._read_fd is not None and self._write_fd is not None

    # -- writing ---------------------------------------------------------------------------------------------

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`.

        :raise ChannelError: When the peer is gone or the descriptor fails.
        :raise Cancelled: When the migration is cancelled before all of it was accepted.
        """
        # One piece is written without a list: for a proxy the difference is a third of its time.
        view = memoryview(data).cast("B")
        while view:
            self._cancellation.check()
            if self._write_fd is None or self._closed:
                raise ChannelError(f"{self.peer} is not open for writing")
            try:
                sent = os.write(self._write_fd, view)
            except BlockingIOError:
                self._wait(self._write_fd, select.POLLOUT)
                continue
            except OSError as error:
                raise ChannelError(f"writing to {self.peer}: {describe(error)}") from error
            self.transferred += sent
            view = view[sent:]

    def send_vectors(self, vectors: Vectors) -> None:
        """Write what `vectors` points at, in order, without copying it. The memory must stay where it is
        meanwhile.

        :raise ChannelError: When the peer is gone or the descriptor fails.
        :raise Cancelled: When the migration is cancelled before all of it was accepted.
        """
        for first in range(0, len(vectors), IOV_MAX):
            self._send_some(vectors[first : first + IOV_MAX])

    def _send_some(self, vectors: Vectors) -> None:
        if self._write_fd is None or self._closed:
            raise ChannelError(f"{self.peer} is not open for writing")
        ends = np.cumsum(vectors[:, 1], dtype=np.int64)
        total = int(ends[-1])
        done, first = 0, 0
        while done < total:
            self._cancellation.check()
            sent = _writev(self._write_fd, vectors.ctypes.data + first * 16, len(vectors) - first)
            if sent < 0:
                code = ctypes.get_errno()
                if code == errno.EINTR:
                    continue
                if code in (errno.EAGAIN, errno.EWOULDBLOCK):
                    started = time.monotonic()
                    self._wait(self._write_fd, select.POLLOUT)
                    self.waited_seconds += time.monotonic() - started
                    continue
                raise ChannelError(f"writing to {self.peer}: {os.strerror(code).lower()}")
            done += sent
            self.transferred += sent
            if done < total:
                # The first vector that is not all gone starts where the kernel stopped reading it.
                first = int(np.searchsorted(ends, done, side="right"))
                rest = int(ends[first]) - done
                vectors = vectors.copy()
                vectors[first, 0] += vectors[first, 1] - np.uint64(rest)
                vectors[first, 1] = rest

    def finish(self) -> None:
        """Say that nothing more will be written, and make sure that all of it arrived where it can be known.

        :raise ChannelError: When it did not (the command failed, the file cannot be synced).
        """

    # -- reading ---------------------------------------------------------------------------------------------

    def readinto(self, buffer: memoryview | bytearray) -> int:
        """Read what there is, at least one byte; wait for it.

        :return: bytes read; 0 at the end of the stream.
        :raise ChannelError: When the connection breaks.
        :raise Cancelled: When the migration is cancelled.
        """
        while True:
            got = self._read_now(buffer)
            if got is not None:
                return got
            assert self._read_fd is not None
            self._wait(self._read_fd, select.POLLIN)

    def readinto_vectors(self, vectors: Vectors) -> int:
        """Read what there is, at least one byte, to where `vectors` points, in order; wait for it. The memory must stay where
        it is meanwhile.

        :return: bytes read; 0 at the end of the stream.
        :raise ChannelError: When the connection breaks.
        :raise Cancelled: When the migration is cancelled.
        """
        while True:
            self._cancellation.check()
            if self._read_fd is None or self._closed:
                raise ChannelError(f"{self.peer} is not open for reading")
            got = int(_readv(self._read_fd, vectors.ctypes.data, min(len(vectors), IOV_MAX)))
            if got >= 0:
                return got
            code = ctypes.get_errno()
            if code in (errno.EAGAIN, errno.EWOULDBLOCK):
                self._wait(self._read_fd, select.POLLIN)
            elif code != errno.EINTR:
                raise ChannelError(f"reading from {self.peer}: {os.strerror(code).lower()}")

    def readinto_now(self, buffer: memoryview | bytearray) -> int | None:
        """As `readinto`, and None at once when nothing has arrived."""
        return self._read_now(buffer)

    def _read_now(self, buffer: memoryview | bytearray) -> int | None:
        self._cancellation.check()
        if self._read_fd is None or self._closed:
            raise ChannelError(f"{self.peer} is not open for reading")
        try:
            return os.readv(self._read_fd, [buffer])
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelError(f"reading from {self.peer}: {describe(error)}") from error

    def wait_readable(self, seconds: float) -> bool:
        """Whether there is something to read (or the stream ended) within so many seconds.

        :raise Cancelled: When the migration is cancelled meanwhile.
        """
        if self._read_fd is None or self._closed:
            return False
        return self._wait(self._read_fd, select.POLLIN, time.monotonic() + seconds)

    def _wait(self, fd: int, events: int, deadline: float | None = None) -> bool:
        poll = select.poll()
        poll.register(fd, events)
        poll.register(self._cancellation.fileno(), select.POLLIN)
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = poll.poll(timeout)
        self._cancellation.check()
        return bool(ready)

    def unsent_bytes(self) -> int:
        """Bytes that were written and are known not to have arrived yet."""
        return 0

    def watch(self, cancellation: Cancellation) -> None:
        """From now on, let this cancellation end the waits instead of the one given at the start."""
        self._cancellation = cancellation

    def hung_up(self) -> bool:
        """Whether the peer is known to write no more; bytes may be left to read."""
        return False

    def stop_reading(self) -> None:
        """Whoever waits for bytes, in whichever thread, finds the stream ended, where that can be had; writing goes on."""

    def end_writing(self) -> None:
        """Say that nothing more will be written on a channel that stays open for reading."""

    def drain(self) -> None:
        """Let what was written arrive before the channel is closed, where closing could destroy it."""

    # -- closing ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give up the stream, whatever is still in flight."""
        if self._closed:
            return
        self._closed = True
        if self._owner is not None:
            self._owner.close()
            return
        for fd in {self._read_fd, self._write_fd} - {None}:
            assert fd is not None
            os.close(fd)

    def __enter__(self) -> "Channel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_socket(fd: int) -> bool:
    """Whether a descriptor is a socket, so that it carries both directions."""
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
