"""The kernel's interrupt controller, which wakes vCPUs and no guest sees (Linux, Documentation/virt/kvm/devices/arm-vgic-v3.rst).

A guest's GICv2 is a device of its board's, outside the kernel. But the kernel ends a `wfi` only for an interrupt of its own
controller's. So each VM has one, where no guest looks, with two interrupts per vCPU that are enabled for good: the virtual
timer's, and one that stands for the CPU's interrupt line. Guests poll with interrupts masked, so neither is ever taken.
It holds nothing that a guest could miss: the timer's level follows the timer, the other's follows the board's device.
"""

import ctypes
from enum import IntEnum

from sterna.hypervisor.interface import Unsupported
from sterna.hypervisor.kvm.ioctl import Descriptor, KvmError, iow, iowr


class CreateDevice(ctypes.Structure):
    """struct kvm_create_device"""

    _fields_ = (("type", ctypes.c_uint32), ("fd", ctypes.c_uint32), ("flags", ctypes.c_uint32))


class DeviceAttr(ctypes.Structure):
    """struct kvm_device_attr"""

    _fields_ = (
        ("flags", ctypes.c_uint32),
        ("group", ctypes.c_uint32),
        ("attr", ctypes.c_uint64),
        ("addr", ctypes.c_uint64),
    )


class IrqLevel(ctypes.Structure):
    """struct kvm_irq_level"""

    _fields_ = (("irq", ctypes.c_uint32), ("level", ctypes.c_uint32))


CREATE_DEVICE = iowr("KVM_CREATE_DEVICE", 0xE0, CreateDevice)
SET_DEVICE_ATTR = iow("KVM_SET_DEVICE_ATTR", 0xE1, DeviceAttr)
IRQ_LINE = iow("KVM_IRQ_LINE", 0x61, IrqLevel)

_V2, _V3 = 5, 7  # KVM_DEV_TYPE_ARM_VGIC_*


class _Group(IntEnum):
    """KVM_DEV_ARM_VGIC_GRP_*"""

    ADDR = 0
    DIST_REGS = 1
    CPU_REGS = 2
    CTRL = 4
    REDIST_REGS = 5
    CPU_SYSREGS = 6


_CTRL_INIT = 0
_V2_DISTRIBUTOR, _V2_CPU_INTERFACE, _V3_DISTRIBUTOR, _V3_REDISTRIBUTOR = 0, 1, 2, 3
_DISTRIBUTOR_AT = 0xF0_0000_0000
"""In a guest's address space: within 40 bits, and no board of ours reaches beyond 32."""
_CPUS_AT = _DISTRIBUTOR_AT + 0x10_0000

TIMER_PPI = 27
"""The virtual timer's, as the kernel has it unless told otherwise."""
_LINE_PPI = 16
_ENABLED = 1 << TIMER_PPI | 1 << _LINE_PPI
_ENABLE_GROUP_1 = 1 << 1  # GICD_CTLR
_V2_ENABLE = 1
_ISENABLER = 0x100
_SGI_FRAME = 0x1_0000  # of a redistributor: its second page of 64 KiB
_LOWEST_PRIORITY = 0xFF
_PMR_EL1 = 3 << 14 | 0 << 11 | 4 << 7 | 6 << 3 | 0
_V2_PMR, _V2_CTLR = 0x04, 0x00
_LINE_TYPE_PPI = 2 << 24
_LINE_CPU_SHIFT = 16
_V2_CPU_SHIFT = _V3_CPU_SHIFT = 32


class Vgic:
    """The controller of a VM. To be made before its vCPUs; `start` once all are there.

    :param vm: the VM's descriptor
    :raise Unsupported: When this host's KVM has none.
    """

    def __init__(self, vm: Descriptor) -> None:
        self._vm = vm
        self._version, self._device = _create(vm)
        if self._version == _V3:
            places = ((_V3_DISTRIBUTOR, _DISTRIBUTOR_AT), (_V3_REDISTRIBUTOR, _CPUS_AT))
        else:
            places = ((_V2_DISTRIBUTOR, _DISTRIBUTOR_AT), (_V2_CPU_INTERFACE, _CPUS_AT))
        for what, address in places:
            self._set(_Group.ADDR, what, ctypes.c_uint64(address))

    def start(self, cpus: int) -> None:
        """Let it serve so many vCPUs, all of the VM's."""
        self._set(_Group.CTRL, _CTRL_INIT, None)
        if self._version == _V3:
            self._set(_Group.DIST_REGS, 0, ctypes.c_uint32(_ENABLE_GROUP_1))
            for cpu in range(cpus):
                where = _affinity(cpu) << _V3_CPU_SHIFT
                self._set(_Group.REDIST_REGS, where | _SGI_FRAME | _ISENABLER, ctypes.c_uint32(_ENABLED))
                self._set(_Group.CPU_SYSREGS, where | _PMR_EL1, ctypes.c_uint64(_LOWEST_PRIORITY))
        else:
            self._set(_Group.DIST_REGS, 0, ctypes.c_uint32(_V2_ENABLE))
            for cpu in range(cpus):
                where = cpu << _V2_CPU_SHIFT
                self._set(_Group.DIST_REGS, where | _ISENABLER, ctypes.c_uint32(_ENABLED))
                self._set(_Group.CPU_REGS, where | _V2_CTLR, ctypes.c_uint32(_V2_ENABLE))
                self._set(_Group.CPU_REGS, where | _V2_PMR, ctypes.c_uint32(_LOWEST_PRIORITY))

    def set_line(self, cpu: int, level: bool) -> None:
        """The level of a vCPU's interrupt line. High, it ends a `wfi`. Any thread may call."""
        self._vm.call(IRQ_LINE, IrqLevel(_LINE_TYPE_PPI | cpu << _LINE_CPU_SHIFT | _LINE_PPI, int(level)))

    def _set(self, group: _Group, attribute: int, value: "ctypes.c_uint32 | ctypes.c_uint64 | None") -> None:
        address = 0 if value is None else ctypes.addressof(value)
        self._device.call(SET_DEVICE_ATTR, DeviceAttr(0, int(group), attribute, address))

    def close(self) -> None:
        """Close its descriptor; the controller is gone with the VM."""
        self._device.close()


def _create(vm: Descriptor) -> tuple[int, Descriptor]:
    for version in (_V3, _V2):
        request = CreateDevice(version)
        error, _ = vm.attempt(CREATE_DEVICE, request)
        if not error:
            return version, Descriptor(request.fd)
    raise Unsupported(f"this host's KVM has no GIC for guests: {KvmError(CREATE_DEVICE, request, error)}")


def _affinity(cpu: int) -> int:
    """What MPIDR_EL1 says of vCPU `cpu` (Linux, arch/arm64/kvm/sys_regs.c, reset_mpidr), packed as the GIC's calls want it."""
    return (cpu >> 12 & 0xFF) << 16 | (cpu >> 4 & 0xFF) << 8 | cpu & 0xF
