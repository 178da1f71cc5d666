"""ioctl on KVM's descriptors: request numbers, and errors that say which call with which arguments.

Numbers are made as in include/uapi/asm-generic/ioctl.h: direction, size of the argument, KVM's letter (0xAE), number.
"""

import ctypes
import errno
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

from sterna.hypervisor.interface import HypervisorError

_LETTER = 0xAE
_WRITE, _READ = 1, 2

Structure: TypeAlias = type[ctypes.Structure] | type[ctypes.c_uint64]
Argument: TypeAlias = "int | ctypes.Structure | ctypes.c_uint64 | ctypes.Array[Any]"


@dataclass(frozen=True)
class Request:
    """One ioctl.

    :ivar name: its name in the kernel's headers
    """

    name: str
    number: int


def _number(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _LETTER << 8 | number


def io(name: str, number: int) -> Request:
    """A request without a structure (_IO)."""
    return Request(name, _number(0, number, 0))


def ior(name: str, number: int, structure: Structure) -> Request:
    """A request that fills a structure (_IOR)."""
    return Request(name, _number(_READ, number, ctypes.sizeof(structure)))


def iow(name: str, number: int, structure: Structure) -> Request:
    """A request that takes a structure (_IOW)."""
    return Request(name, _number(_WRITE, number, ctypes.sizeof(structure)))


def iowr(name: str, number: int, structure: Structure) -> Request:
    """A request that takes and fills a structure (_IOWR)."""
    return Request(name, _number(_READ | _WRITE, number, ctypes.sizeof(structure)))


class KvmError(HypervisorError):
    """The kernel refused a call; the text has the call, its arguments and the error.

    :ivar errno: the kernel's error number
    """

    def __init__(self, request: Request, argument: object, error: int, advice: str = "") -> None:
        name = errno.errorcode.get(error, str(error))
        text = f"{request.name}({describe(argument)}): {os.strerror(error)} ({name})"
        super().__init__(f"{text}; {advice}" if advice else text)
        self.errno = error


def describe(argument: object) -> str:
    """An ioctl's argument as text: a number, or a structure's numbers by name."""
    if isinstance(argument, int):
        return f"{argument:#x}" if argument > 9 else str(argument)
    if not isinstance(argument, ctypes.Structure):
        return type(argument).__name__
    parts = []
    for field in argument._fields_:
        value = getattr(argument, field[0])
        if isinstance(value, int) and not field[0].startswith("pad"):
            parts.append(f"{field[0]}={describe(value)}")
    return ", ".join(parts)


_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_ioctl.restype = ctypes.c_int


class Descriptor:
    """An open file of KVM's: the system, a VM, a vCPU, statistics. A context manager; closing twice does nothing.

    :ivar number: the file descriptor
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def call(self, request: Request, argument: Argument = 0) -> int:
        """Make the call, again when a signal interrupts it. Other threads run meanwhile.

        :return: what the ioctl returns
        :raise KvmError: When the kernel refuses.
        """
        error, value = self.attempt(request, argument)
        while error == errno.EINTR:
            error, value = self.attempt(request, argument)
        if error:
            raise KvmError(request, argument, error)
        return value

    def attempt(self, request: Request, argument: Argument = 0) -> tuple[int, int]:
        """Make the call once.

        :return: the error number or 0, and what the ioctl returned
        """
        value = _ioctl(
            self.number,
            request.number,
            argument if isinstance(argument, int) else ctypes.addressof(argument),
        )
        return (ctypes.get_errno(), value) if value < 0 else (0, value)

    def close(self) -> None:
        """Close it."""
        if self.number >= 0:
            os.close(self.number)
            self.number = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
