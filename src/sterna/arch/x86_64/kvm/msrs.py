"""Model-specific registers (Documentation/virt/kvm/api.rst, 4.3, 4.18, 4.19)."""

import ctypes
import errno
from collections.abc import Iterable, Mapping

from sterna.arch.x86_64.state import MSR_TSC
from sterna.hypervisor.interface import HypervisorError
from sterna.hypervisor.kvm.ioctl import Descriptor, KvmError, iow, iowr


class MsrList(ctypes.Structure):
    """struct kvm_msr_list, without the indices that follow"""

    _fields_ = (("nmsrs", ctypes.c_uint32),)


class MsrEntry(ctypes.Structure):
    """struct kvm_msr_entry"""

    _fields_ = (("index", ctypes.c_uint32), ("reserved", ctypes.c_uint32), ("data", ctypes.c_uint64))


class Msrs(ctypes.Structure):
    """struct kvm_msrs, without the entries that follow"""

    _fields_ = (("nmsrs", ctypes.c_uint32), ("pad", ctypes.c_uint32))


GET_MSR_INDEX_LIST = iowr("KVM_GET_MSR_INDEX_LIST", 0x02, MsrList)
GET_MSRS = iowr("KVM_GET_MSRS", 0x88, Msrs)
SET_MSRS = iow("KVM_SET_MSRS", 0x89, Msrs)


def _filled(values: Iterable[tuple[int, int]]) -> ctypes.Structure:
    entries = [MsrEntry(index, 0, data) for index, data in values]

    class Filled(ctypes.Structure):
        _fields_ = (("head", Msrs), ("entries", MsrEntry * len(entries)))

    return Filled(Msrs(len(entries)), (MsrEntry * len(entries))(*entries))


def list_msrs(system: Descriptor) -> list[int]:
    """The numbers of the MSRs that make up a vCPU's state, as the kernel tells them."""
    head = MsrList(0)
    error, _ = system.attempt(GET_MSR_INDEX_LIST, head)
    if error not in (0, errno.E2BIG):
        raise KvmError(GET_MSR_INDEX_LIST, head, error)
    numbers = (ctypes.c_uint32 * (1 + head.nmsrs))(head.nmsrs)
    system.call(GET_MSR_INDEX_LIST, numbers)
    return list(numbers[1 : 1 + numbers[0]])


def get_msrs(vcpu: Descriptor, numbers: Iterable[int]) -> dict[int, int]:
    """Values by number. Those that this vCPU does not have are left out."""
    wanted = list(numbers)
    values: dict[int, int] = {}
    while wanted:
        request = _filled((number, 0) for number in wanted)
        got = vcpu.call(GET_MSRS, request)
        values |= {entry.index: entry.data for entry in request.entries[:got]}
        wanted = wanted[got + 1 :]  # the kernel stops at the first that it cannot read
    return values


def set_msrs(vcpu: Descriptor, values: Mapping[int, int]) -> None:
    """Set them, the time stamp counter last.

    :raise HypervisorError: When one has another value in this vCPU and cannot be set; the text names it.
    """
    pending = sorted(values.items(), key=lambda item: (item[0] == MSR_TSC, item[0]))
    while pending:
        done = vcpu.call(SET_MSRS, _filled(pending))
        if done < len(pending):
            number, value = pending[done]
            here = get_msrs(vcpu, [number]).get(number)
            if here != value:
                shown = "it does not exist" if here is None else f"it is {here:#x}"
                raise HypervisorError(f"MSR {number:#x} cannot be set to {value:#x} on this host: {shown}")
        pending = pending[done + 1 :]
