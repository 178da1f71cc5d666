"""Where the processes of virtual machines run: this host, or a network namespace on it, one without a name.

A namespace without a name in the file system lives as long as a process is in it or a descriptor refers to it
(namespaces(7)). Its interfaces go with it. So nothing of a network stays behind, however this process ends.
"""

import ctypes
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sterna.launch.errors import LaunchError, Unsupported

_CLONE_NEWNET = 0x40000000
_SELF = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


class Namespace:
    """A new network namespace. Close it, or end.

    :raise Unsupported: When this process may not make one.
    :raise LaunchError: When the kernel has no room for one.
    """

    def __init__(self) -> None:
        self.fd = _in_thread(_unshare)

    def enter(self) -> None:
        """Move the calling thread in. In a child between fork and exec: the whole process.

        :raise OSError: When the kernel refuses.
        """
        if _libc.setns(self.fd, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` inside, on a thread of its own: files under /proc/sys/net are the namespace's, sockets stay in it."""

        def inside() -> T:
            self.enter()
            return function()

        return _in_thread(inside)

    def close(self) -> None:
        """Let go of it; it ends with its last process. Does nothing the second time."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(frozen=True)
class Host:
    """Where processes run.

    :ivar address: IPv4, where the others reach it
    :ivar namespace: the processes' network; None on loopback
    """

    name: str
    address: str
    namespace: Namespace | None = None

    def enter(self) -> None:
        """In a child between fork and exec: move in."""
        if self.namespace is not None:
            self.namespace.enter()


LOCAL = Host("this host", "127.0.0.1")
"""For VMs that need no network of their own."""


def _unshare() -> int:
    if _libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        if number == errno.EPERM:
            raise Unsupported("network namespaces need root")
        if number in (errno.EINVAL, errno.ENOSYS):
            raise Unsupported("this kernel has no network namespaces")
        raise LaunchError(f"cannot make a network namespace: {os.strerror(number)}")
    return os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)


def _in_thread(function: Callable[[], T]) -> T:
    """The result of `function`, run on a thread that ends: no other thread changes its namespace. After a signal too: what was
    begun is short, and is not left half done.
    """
    with ThreadPoolExecutor(1, "namespace") as thread:
        return thread.submit(function).result()
