"""Tap devices: the host's end of a guest's network card (Linux, Documentation/networking/tuntap.rst)."""

import errno
import fcntl
import os
import struct

from sterna.machine.errors import MachineError

_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_TUNGETIFF = 0x800454D2
_TUNSETOFFLOAD = 0x400454D0
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFREQ = struct.Struct("16sH22x")
_FRAME_BYTES = 1 << 17


class TapError(MachineError):
    """A tap cannot be used; the text names it and what to do."""


class Tap:
    """An open tap. What it was made of stays as it was when it is closed: a lasting device lasts.

    :ivar name: the interface's
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        os.set_blocking(fd, False)

    @classmethod
    def open(cls, name: str) -> "Tap":
        """A tap by its interface's name; one that is not there is made, and goes when it is closed.

        :raise TapError: When the kernel refuses.
        """
        try:
            fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hint = {errno.ENOENT: " (modprobe tun)", errno.EACCES: " (run as root)"}.get(error.errno or 0, "")
            raise TapError(f"cannot open {_TUN}: {error.strerror}{hint}") from error
        try:
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _IFF_TAP | _IFF_NO_PI))
            fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
        except OSError as error:
            os.close(fd)
            raise TapError(f"cannot open the tap {name}: {_reason(name, error)}") from error
        return cls(fd, name)

    @classmethod
    def adopt(cls, fd: int) -> "Tap":
        """A tap that the parent process opened; it is closed with this object.

        :raise TapError: When the descriptor is no such tap.
        """
        try:
            raw = fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size))
        except OSError as error:
            raise TapError(f"descriptor {fd} is not a tap that has been set up: {error.strerror}") from error
        name, flags = _IFREQ.unpack(raw)
        text = name.rstrip(b"\0").decode(errors="replace")
        if not flags & _IFF_TAP:
            raise TapError(
                f"descriptor {fd} is the tun device {text}, which carries no Ethernet: a tap is needed"
            )
        if not flags & _IFF_NO_PI or flags & _IFF_VNET_HDR:
            raise TapError(f"descriptor {fd}, tap {text}: open it with IFF_NO_PI and without IFF_VNET_HDR")
        os.set_inheritable(fd, False)
        return cls(fd, text)

    def fileno(self) -> int:
        """For poll."""
        return self._fd

    def receive(self) -> bytes | None:
        """The next frame.

        :raise OSError: When the device is gone.
        """
        try:
            return os.read(self._fd, _FRAME_BYTES)
        except BlockingIOError:
            return None

    def send(self, frame: bytes) -> bool:
        """Send a frame; one that the kernel does not take (the interface is down, its queue full) is lost."""
        try:
            os.write(self._fd, frame)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


def _reason(name: str, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "another process has it open"
    if error.errno == errno.EPERM:
        return f"not permitted; run as root, or have root make it: ip tuntap add {name} mode tap user $USER"
    if error.errno == errno.EINVAL:
        return "there is an interface of that name that is not a tap"
    return error.strerror or str(error)
