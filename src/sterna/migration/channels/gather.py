"""Gather lists through descriptors: compiled loops around system calls.

A list of some thousand pieces takes many calls, each of which may stop anywhere in it or find no room. The loops run
without the GIL from the first byte to the last, waits included, so that channels of one process do not wait for each other.
"""

import ctypes
import errno
import select
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import Late, kernel
from sterna.memory.vectors import Vectors

IOV_MAX = 1024
"""Most vectors one writev takes (UIO_MAXIOV, include/uapi/linux/uio.h)."""
CANCELLED = -1
"""Instead of an error number: the cancellation's descriptor is readable."""

_POLLIN, _POLLOUT = select.POLLIN, select.POLLOUT
_EAGAIN, _ETIMEDOUT, _CLOCK_MONOTONIC = errno.EAGAIN, errno.ETIMEDOUT, time.CLOCK_MONOTONIC

_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.writev, _libc.readv):
    _call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    _call.restype = ctypes.c_ssize_t

carray: Any = Late("sterna.jit.intrinsics:carray")
# By name, so that compiled code can be kept: addresses differ from run to run. ctypes releases the GIL around the call: other
# threads go on while the kernel copies.
_writev: Any = Late("sterna.migration.channels.intrinsics:writev", plain=_libc.writev)
_readv: Any = Late("sterna.migration.channels.intrinsics:readv", plain=_libc.readv)
_poll: Any = Late("sterna.migration.channels.intrinsics:poll")
_clock_gettime: Any = Late("sterna.migration.channels.intrinsics:clock_gettime")
_errno_location: Any = Late("sterna.migration.channels.intrinsics:errno_location")
stack_words: Any = Late("sterna.jit.intrinsics:stack_words")


def _errno_twin() -> int:
    return ctypes.get_errno()


@kernel(twin=_errno_twin, ahead=False)
def _errno() -> int:
    """Number of the last system call's error."""
    return int(carray(_errno_location(), 1)[0])


def _monotonic_twin() -> int:
    return time.monotonic_ns()


@kernel(twin=_monotonic_twin, ahead=False)
def _monotonic() -> int:
    """CLOCK_MONOTONIC in ns."""
    now = stack_words(2)
    _clock_gettime(_CLOCK_MONOTONIC, now.ctypes.data)
    return int(now[0] * 1_000_000_000 + now[1])


def _wait_twin(fd: int, events: int, cancel_fd: int, timeout_ms: int) -> int:
    poll = select.poll()
    poll.register(fd, events)
    poll.register(cancel_fd, _POLLIN)
    ready = dict(poll.poll(timeout_ms))
    if not ready:
        return _ETIMEDOUT
    return CANCELLED if cancel_fd in ready else 0


@kernel(twin=_wait_twin, ahead=False)
def _wait(fd: int, events: int, cancel_fd: int, timeout_ms: int) -> int:
    """Wait for events of a descriptor.

    :param timeout_ms: how long, -1 for ever
    :return: 0, CANCELLED, or an error number: that of a signal is for the caller to see to
    """
    fds = stack_words(2)
    fds[0] = fd | events << 32
    fds[1] = cancel_fd | _POLLIN << 32
    ready = _poll(fds.ctypes.data, 2, timeout_ms)
    if ready < 0:
        return _errno()
    if ready == 0:
        return _ETIMEDOUT
    return CANCELLED if fds[1] >> 48 else 0


@kernel(ahead=False)
def advance(vectors: Vectors, row: int, size: int) -> int:
    """Take bytes off a gather list from `row` on.

    :return: the first row that is left, cut where it must be
    """
    while row < len(vectors) and size >= int(vectors[row, 1]):
        size -= int(vectors[row, 1])
        row += 1
    if size:
        vectors[row, 0] += np.uint64(size)
        vectors[row, 1] -= np.uint64(size)
    return row


@kernel()
def write_list(
    fd: int, cancel_fd: int, vectors: Vectors, row: int, done: NDArray[np.int64], patience_ms: int
) -> tuple[int, int]:
    """Write all that a gather list points at from `row` on, waiting for room.

    :param fd: a descriptor that does not block
    :param cancel_fd: ends a wait when it is readable
    :param vectors: what has been written is taken off it
    :param done: the bytes written, and the ns it waited, are added to its two numbers
    :param patience_ms: how long there may be no room, -1 for ever
    :return: where the rest of the list begins; and 0, CANCELLED, or an error number (EINTR among them, and ETIMEDOUT when there
        was no room for too long)
    """
    while row < len(vectors):
        sent = _writev(fd, vectors.ctypes.data + row * 16, min(len(vectors) - row, IOV_MAX))
        if sent < 0:
            code = _errno()
            if code == _EAGAIN:
                started = _monotonic()
                code = _wait(fd, _POLLOUT, cancel_fd, patience_ms)
                done[1] += _monotonic() - started
            if code:
                return row, code
            continue
        done[0] += sent
        row = advance(vectors, row, sent)
    return row, 0


@kernel()
def read_list(fd: int, cancel_fd: int, vectors: Vectors, row: int, least: int) -> tuple[int, int, int]:
    """Read at least so many bytes to where a gather list points from `row` on, waiting for them.

    :param fd: a descriptor that does not block
    :param cancel_fd: ends a wait when it is readable
    :param vectors: what has been read is taken off it
    :param least: no more than the list has room for
    :return: bytes read, less than `least` only when the stream ended or there is an error; where the rest of the list begins;
        and 0, CANCELLED, or an error number (EINTR among them)
    """
    done = 0
    while done < least:
        got = _readv(fd, vectors.ctypes.data + row * 16, min(len(vectors) - row, IOV_MAX))
        if got < 0:
            code = _errno()
            if code == _EAGAIN:
                code = _wait(fd, _POLLIN, cancel_fd, -1)
            if code:
                return done, row, code
            continue
        if got == 0:
            return done, row, 0
        done += got
        row = advance(vectors, row, got)
    return done, row, 0
