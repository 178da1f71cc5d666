"""A channel: a byte stream to or from a peer, over any file descriptor.

Reads fill buffers in place, writes gather from wherever the bytes lie. Descriptors are non-blocking and every
wait also watches the cancellation, so that a peer which stops reading cannot hold a migration.
"""

import errno
import fcntl
import os
import select
import stat
import sys
import termios
import time
from typing import Any

import numpy as np

from sterna.host.closing import Closing
from sterna.memory.vectors import Vectors
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import gather
from sterna.migration.errors import ChannelError

_READER_SECONDS = 0.002
"""How often to look whether a pipe has been read."""


def describe(error: Exception) -> str:
    """An error's text; an operating system's in lower case, without the number."""
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)


class Channel(Closing):
    """One open byte stream. Closing is idempotent; `with` closes it.

    :ivar peer: who is at the other end, as in the URI
    :ivar two_way: both directions work, so the peer can answer
    :ivar transferred: bytes written so far
    :ivar decisive_at: when so many bytes have been written, whoever is at the other end may have the guest; None when never
    :ivar waited_seconds: how long writers have waited for the peer in all
    :cvar patience_seconds: how long a peer may take nothing of what is written; None for ever
    """

    patience_seconds: float | None = None

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
        self.decisive_at: int | None = None
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
                patience = self.patience_seconds
                deadline = None if patience is None else time.monotonic() + patience
                if not self._wait(self._write_fd, select.POLLOUT, deadline):
                    raise self._write_error(errno.ETIMEDOUT) from None
                continue
            except OSError as error:
                raise self._write_error(error.errno) from error
            self.transferred += sent
            view = view[sent:]

    def send_vectors(self, vectors: Vectors) -> int:
        """Write what `vectors` points at, in order, without copying it. The memory must stay where it is
        meanwhile.

        :param vectors: what has been written is taken off it
        :return: bytes written
        :raise ChannelError: When the peer is gone or the descriptor fails.
        :raise Cancelled: When the migration is cancelled before all of it was accepted.
        """
        if self._write_fd is None or self._closed:
            raise ChannelError(f"{self.peer} is not open for writing")
        row, done = 0, np.zeros(2, dtype=np.int64)
        patience_ms = -1 if self.patience_seconds is None else int(self.patience_seconds * 1000)
        try:
            while row < len(vectors):
                self._cancellation.check()
                row, code = gather.write_list(
                    self._write_fd, self._cancellation.fileno(), vectors, row, done, patience_ms
                )
                if code > 0 and code != errno.EINTR:
                    raise self._write_error(code)
        finally:
            sent, waited_ns = done.tolist()
            self.waited_seconds += waited_ns / 1e9
            self.transferred += sent
        return int(sent)

    def _write_error(self, code: int | None) -> ChannelError:
        if code == errno.ETIMEDOUT:
            # The kernel's word for it, and ours: TCP gives up where nothing is acknowledged, or there is no room.
            return ChannelError(
                f"writing to {self.peer}: it took nothing for {self.patience_seconds or 0:g} s"
            )
        return ChannelError(f"writing to {self.peer}: {os.strerror(code or errno.EIO).lower()}")

    def await_reader(self) -> None:
        """Wait until whoever reads a pipe has taken all that was written; on other channels nothing.

        :raise ChannelError: When nobody reads it any more.
        :raise Cancelled: When the migration is cancelled meanwhile.
        """
        fd = self._write_fd
        if fd is None or not stat.S_ISFIFO(os.fstat(fd).st_mode):
            return
        poll = select.poll()
        poll.register(fd, select.POLLERR)
        while not poll.poll(0):
            waiting = bytearray(4)
            fcntl.ioctl(fd, termios.FIONREAD, waiting)
            if not int.from_bytes(waiting, sys.byteorder):
                return
            self._cancellation.sleep(_READER_SECONDS)
        raise ChannelError(f"writing to {self.peer}: nobody reads it any more")

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
            got = self.readinto_now(buffer)
            if got is not None:
                return got
            assert self._read_fd is not None
            self._wait(self._read_fd, select.POLLIN)

    def read_vectors(self, vectors: Vectors, row: int, least: int) -> tuple[int, int]:
        """Read at least so many bytes to where `vectors` points from `row` on, in order, waiting for them. The memory must stay
        where it is meanwhile.

        :param vectors: what has been read is taken off it
        :return: bytes read, less than `least` at the end of the stream; where the rest of the list begins
        :raise ChannelError: When the connection breaks.
        :raise Cancelled: When the migration is cancelled.
        """
        done = 0
        while True:
            self._cancellation.check()
            if self._read_fd is None or self._closed:
                raise ChannelError(f"{self.peer} is not open for reading")
            got, row, code = gather.read_list(
                self._read_fd, self._cancellation.fileno(), vectors, row, least - done
            )
            done += got
            if not code:
                return done, row
            if code > 0 and code != errno.EINTR:
                raise ChannelError(f"reading from {self.peer}: {os.strerror(code).lower()}")

    def descriptors(self) -> tuple[int, int]:
        """What compiled code reads from, and what ends its waits; -1 for what is not open.

        It leaves ends and errors to be found by whoever reads next.
        """
        open_fd = None if self._closed else self._read_fd
        return -1 if open_fd is None else open_fd, self._cancellation.fileno()

    def readinto_now(self, buffer: memoryview | bytearray) -> int | None:
        """As `readinto`, and None at once when nothing has arrived."""
        self._cancellation.check()
        if self._read_fd is None or self._closed:
            raise ChannelError(f"{self.peer} is not open for reading")
        try:
            return os.readv(self._read_fd, [buffer])
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelError(f"reading from {self.peer}: {describe(error)}") from error

    def wait_readable(self, seconds: float | None) -> bool:
        """Whether there is something to read (or the stream ended) within so many seconds, None for ever.

        :raise Cancelled: When the migration is cancelled meanwhile.
        """
        if self._read_fd is None or self._closed:
            return False
        return self._wait(
            self._read_fd, select.POLLIN, None if seconds is None else time.monotonic() + seconds
        )

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

    def await_arrival(self, seconds: float) -> None:
        """Wait until the host that the connection leads to has all that was written; where a connection stays on this host, until
        it is read. Channels that cannot tell do not wait.

        :raise ChannelError: When it broke before that, or that takes longer than so many seconds.
        :raise Cancelled: When the migration is cancelled meanwhile.
        """

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


def is_socket(fd: int) -> bool:
    """Whether a descriptor is a socket, so that it carries both directions."""
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
