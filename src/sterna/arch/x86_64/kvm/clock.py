"""The VM's clock, kvmclock, and the time stamp counter's frequency (Documentation/virt/kvm/api.rst, 4.29, 4.30, 4.56)."""

import ctypes

from sterna.hypervisor.kvm.ioctl import Descriptor, io, ior, iow


class ClockData(ctypes.Structure):
    """struct kvm_clock_data"""

    _fields_ = (
        ("clock", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("pad0", ctypes.c_uint32),
        ("realtime", ctypes.c_uint64),
        ("host_tsc", ctypes.c_uint64),
        ("pad", ctypes.c_uint32 * 4),
    )


SET_CLOCK = iow("KVM_SET_CLOCK", 0x7B, ClockData)
GET_CLOCK = ior("KVM_GET_CLOCK", 0x7C, ClockData)
GET_TSC_KHZ = io("KVM_GET_TSC_KHZ", 0xA3)
SET_TSC_KHZ = io("KVM_SET_TSC_KHZ", 0xA2)


def get_clock(vm: Descriptor) -> int:
    """The VM's clock, in ns."""
    data = ClockData()
    vm.call(GET_CLOCK, data)
    return int(data.clock)


def set_clock(vm: Descriptor, ns: int) -> None:
    """Let the VM's clock go on from `ns`."""
    vm.call(SET_CLOCK, ClockData(clock=ns))
