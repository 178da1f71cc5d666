"""CPUID: what this host's KVM can show a guest, and what a vCPU shows (Documentation/virt/kvm/api.rst, 4.46, 4.20)."""

import ctypes
import errno
from collections.abc import Sequence
from dataclasses import replace

from sterna.arch.x86_64.state import Leaf
from sterna.hypervisor.kvm.ioctl import Descriptor, KvmError, iow, iowr

_ROOM = 64
_LIMIT = 1 << 12
_APIC_ID_SHIFT = 24
_TOPOLOGY_LEAVES = (0xB, 0x1F)


class CpuidEntry(ctypes.Structure):
    """struct kvm_cpuid_entry2"""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", ctypes.c_uint32 * 3),
    )


class Cpuid(ctypes.Structure):
    """struct kvm_cpuid2, without the entries that follow"""

    _fields_ = (("nent", ctypes.c_uint32), ("padding", ctypes.c_uint32))


GET_SUPPORTED_CPUID = iowr("KVM_GET_SUPPORTED_CPUID", 0x05, Cpuid)
SET_CPUID2 = iow("KVM_SET_CPUID2", 0x90, Cpuid)


def _structure(room: int) -> type[ctypes.Structure]:
    class Filled(ctypes.Structure):
        _fields_ = (("head", Cpuid), ("entries", CpuidEntry * room))

    return Filled


def supported_cpuid(system: Descriptor) -> list[Leaf]:
    """The leaves that the kernel can show a guest on this host."""
    room = _ROOM
    while True:
        answer = _structure(room)(Cpuid(room))
        error, _ = system.attempt(GET_SUPPORTED_CPUID, answer)
        if not error:
            entries = answer.entries[: answer.head.nent]
            return [Leaf(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries]
        if error != errno.E2BIG or room > _LIMIT:
            raise KvmError(GET_SUPPORTED_CPUID, answer, error)
        room *= 2


def of_vcpu(leaves: Sequence[Leaf], index: int) -> list[Leaf]:
    """The leaves of vCPU `index`: its APIC id instead of that of the host's CPU that answered (Intel SDM vol. 2, CPUID)."""
    result = []
    for leaf in leaves:
        if leaf.function == 1:
            leaf = replace(leaf, ebx=leaf.ebx & 0x00FF_FFFF | index << _APIC_ID_SHIFT)
        elif leaf.function in _TOPOLOGY_LEAVES:
            leaf = replace(leaf, edx=index)
        result.append(leaf)
    return result


def set_cpuid(vcpu: Descriptor, leaves: Sequence[Leaf]) -> None:
    """Let a vCPU show these leaves."""
    entries = (CpuidEntry * len(leaves))(
        *(
            CpuidEntry(leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx)
            for leaf in leaves
        )
    )
    vcpu.call(SET_CPUID2, _structure(len(leaves))(Cpuid(len(leaves)), entries))
