"""Memory slots (Documentation/virt/kvm/api.rst, 4.35)."""

import ctypes
import errno

from sterna.hypervisor.interface import MemorySlot
from sterna.hypervisor.kvm.ioctl import Descriptor, KvmError, iow


class UserspaceMemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region"""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),
        ("userspace_addr", ctypes.c_uint64),
    )


SET_USER_MEMORY_REGION = iow("KVM_SET_USER_MEMORY_REGION", 0x46, UserspaceMemoryRegion)

_ADVICE = {
    errno.EEXIST: "the range overlaps another slot, or one of the kernel's own",
    errno.ENOMEM: "the kernel has no memory for the slot or its dirty bitmap",
}


def region_of(slot: MemorySlot) -> UserspaceMemoryRegion:
    """The kernel's argument for a slot."""
    return UserspaceMemoryRegion(
        slot.slot,
        int(slot.flags) if slot.size else 0,
        slot.ipa,
        slot.size,
        slot.block.hva + slot.offset,
    )


def set_memory_slot(vm: Descriptor, slot: MemorySlot) -> None:
    """Create, move, re-flag or (size zero) delete a slot.

    :raise KvmError: When the kernel refuses.
    """
    region = region_of(slot)
    error, _ = vm.attempt(SET_USER_MEMORY_REGION, region)
    while error == errno.EINTR:
        error, _ = vm.attempt(SET_USER_MEMORY_REGION, region)
    if error:
        raise KvmError(SET_USER_MEMORY_REGION, region, error, _ADVICE.get(error, ""))
