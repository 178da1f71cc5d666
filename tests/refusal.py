"""What a host refuses: system calls, and threads.

System calls fail by a filter of the kernel's (seccomp(2)), as at a disk that breaks at that very call. A filter holds for a
thread and for those that it starts, and ends with them: a test's own thread is not touched.
"""

import ctypes
import platform
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pytest

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_ERRNO, _ALLOW = 0x0005_0000, 0x7FFF_0000  # SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW
_NUMBER, _FIRST_ARGUMENT = 0, 16  # offsets in struct seccomp_data; the low half of an argument comes first
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38

_CALLS = {
    "x86_64": {
        "clone": 56,
        "close": 3,
        "fsync": 74,
        "write": 1,
        "writev": 20,
        "read": 0,
        "renameat": 264,
        "vfork": 58,
    },
    "aarch64": {
        "clone": 220,
        "close": 57,
        "fsync": 82,
        "write": 64,
        "writev": 66,
        "read": 63,
        "renameat": 38,
        "vfork": 220,
    },
}
"""Numbers of system calls (asm/unistd_64.h, asm-generic/unistd.h)."""


_Result = TypeVar("_Result")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


@dataclass(frozen=True)
class Refusal:
    """A system call that has no effect and fails with an error number.

    :ivar fd: only with this number as its first argument
    :ivar other_than: only with another number than this
    """

    call: str
    code: int
    fd: int | None = None
    other_than: int | None = None


def refusing(refusal: Refusal, body: Callable[[], _Result]) -> _Result:
    """Run `body` in a thread in which the call fails.

    :return: what it returns; what it raises is raised
    """

    def run() -> _Result:
        refuse(refusal)
        return body()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def refuse(refusal: Refusal) -> None:
    """From now on the call fails in the caller's thread, one that ends soon, and in those that it starts."""
    number = _CALLS[platform.machine()][refusal.call]
    program = [(_LOAD, 0, 0, _NUMBER), (_EQUAL, 0, 3, number)]
    if refusal.fd is not None:
        program += [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 0, 1, refusal.fd)]
    elif refusal.other_than is not None:
        program += [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 1, 0, refusal.other_than)]
    else:
        program[-1] = (_EQUAL, 0, 1, number)
    program += [(_RETURN, 0, 0, _ERRNO | refusal.code), (_RETURN, 0, 0, _ALLOW)]
    steps = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    libc = ctypes.CDLL(None, use_errno=True)
    filter_ = _Program(len(program), ctypes.addressof(steps))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no filter can be set")


def refuse_threads(monkeypatch: pytest.MonkeyPatch, name: str, times: int | None = None) -> None:
    """Threads of this name cannot be started, as where the host has none to spare.

    :param times: how often; None for as long as the test runs
    """
    start, left = threading.Thread.start, [times]

    def refuse(thread: threading.Thread) -> None:
        if thread.name != name or left[0] == 0:
            start(thread)
            return
        if left[0] is not None:
            left[0] -= 1
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
