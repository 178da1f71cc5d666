"""What XSAVE saves, and the extended control registers (Documentation/virt/kvm/api.rst, 4.42 to 4.47, 4.134)."""

import ctypes

from sterna.hypervisor.interface import HypervisorError
from sterna.hypervisor.kvm.ioctl import Descriptor, ior, iow
from sterna.hypervisor.kvm.system import Capability, capability_of

_MAX_XCRS = 16


class Xsave(ctypes.Structure):
    """struct kvm_xsave, without what may follow it"""

    _fields_ = (("region", ctypes.c_uint32 * 1024),)


class Xcr(ctypes.Structure):
    """struct kvm_xcr"""

    _fields_ = (("xcr", ctypes.c_uint32), ("reserved", ctypes.c_uint32), ("value", ctypes.c_uint64))


class Xcrs(ctypes.Structure):
    """struct kvm_xcrs"""

    _fields_ = (
        ("nr_xcrs", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("xcrs", Xcr * _MAX_XCRS),
        ("padding", ctypes.c_uint64 * 16),
    )


GET_XSAVE = ior("KVM_GET_XSAVE", 0xA4, Xsave)
SET_XSAVE = iow("KVM_SET_XSAVE", 0xA5, Xsave)
GET_XSAVE2 = ior("KVM_GET_XSAVE2", 0xCF, Xsave)
GET_XCRS = ior("KVM_GET_XCRS", 0xA6, Xcrs)
SET_XCRS = iow("KVM_SET_XCRS", 0xA7, Xcrs)


def xsave_bytes(vm: Descriptor) -> int:
    """Size of the area that XSAVE writes, for the vCPUs of a VM."""
    return max(capability_of(vm, Capability.XSAVE2), ctypes.sizeof(Xsave))


def get_xsave(vcpu: Descriptor, size: int) -> bytes:
    """The area that XSAVE would write, `size` bytes."""
    area = ctypes.create_string_buffer(size)
    vcpu.call(GET_XSAVE2 if size > ctypes.sizeof(Xsave) else GET_XSAVE, area)
    return area.raw


def set_xsave(vcpu: Descriptor, area: bytes, size: int) -> None:
    """Load it.

    :param size: of this host's area
    :raise HypervisorError: When the area holds more than this host has room for.
    """
    if len(area) > size and area[size:].strip(b"\0"):
        raise HypervisorError(f"an XSAVE area of {len(area)} bytes: this host's has {size}")
    vcpu.call(SET_XSAVE, ctypes.create_string_buffer(area[:size].ljust(size, b"\0"), size))


def get_xcrs(vcpu: Descriptor) -> dict[int, int]:
    """Extended control registers by number."""
    xcrs = Xcrs()
    vcpu.call(GET_XCRS, xcrs)
    return {xcr.xcr: xcr.value for xcr in xcrs.xcrs[: xcrs.nr_xcrs]}


def set_xcrs(vcpu: Descriptor, values: dict[int, int]) -> None:
    """Set them."""
    if len(values) > _MAX_XCRS:
        raise HypervisorError(f"{len(values)} extended control registers: there are at most {_MAX_XCRS}")
    xcrs = Xcrs(nr_xcrs=len(values))
    for position, (number, value) in enumerate(values.items()):
        xcrs.xcrs[position] = Xcr(number, 0, value)
    vcpu.call(SET_XCRS, xcrs)
