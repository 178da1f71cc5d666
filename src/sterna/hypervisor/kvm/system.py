"""The system's ioctls: what this host's KVM can do, and new VMs (Documentation/virt/kvm/api.rst, 4.1 to 4.4)."""

import ctypes
import errno
import os
from collections.abc import Iterable
from enum import IntEnum

from sterna.hypervisor.interface import HypervisorError, Unsupported
from sterna.hypervisor.kvm.ioctl import Descriptor, KvmError, Request, io, iow

DEVICE = "/dev/kvm"
API_VERSION = 12

GET_API_VERSION = io("KVM_GET_API_VERSION", 0x00)
CREATE_VM = io("KVM_CREATE_VM", 0x01)
CHECK_EXTENSION = io("KVM_CHECK_EXTENSION", 0x03)
GET_VCPU_MMAP_SIZE = io("KVM_GET_VCPU_MMAP_SIZE", 0x04)


class EnableCapability(ctypes.Structure):
    """struct kvm_enable_cap"""

    _fields_ = (
        ("cap", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("args", ctypes.c_uint64 * 4),
        ("pad", ctypes.c_uint8 * 64),
    )


ENABLE_CAP = iow("KVM_ENABLE_CAP", 0xA3, EnableCapability)


class Capability(IntEnum):
    """Capabilities, named without KVM_CAP_."""

    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    SYNC_MMU = 16
    DESTROY_MEMORY_REGION_WORKS = 21
    SET_IDENTITY_MAP_ADDR = 37
    ADJUST_CLOCK = 39
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    TSC_CONTROL = 60
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    ONE_REG = 70
    READONLY_MEM = 81
    DEVICE_CTRL = 89
    ARM_EL1_32BIT = 93
    ARM_PSCI_0_2 = 102
    IMMEDIATE_EXIT = 136
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    BINARY_STATS_FD = 203
    XSAVE2 = 208
    DIRTY_LOG_RING_ACQ_REL = 223
    DIRTY_LOG_RING_WITH_BITMAP = 225


class System(Descriptor):
    """An open /dev/kvm.

    :param path: of the device
    :raise Unsupported: When this host, or this user, has no KVM, or it speaks another version of the API.
    :raise HypervisorError: When it cannot be opened for another reason.
    """

    def __init__(self, path: str = DEVICE) -> None:
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            advice = _advice(error.errno or 0)
            kind = Unsupported if advice else HypervisorError
            raise kind(f"cannot open {path}: {error.strerror}{advice}") from error
        try:
            version = self.call(GET_API_VERSION)
        except KvmError as error:
            self.close()
            raise Unsupported(f"{path} is not KVM: {error}") from error
        if version != API_VERSION:
            self.close()
            raise Unsupported(f"{path} speaks version {version} of KVM's API, not {API_VERSION}")

    def check(self, capability: Capability) -> int:
        """What the kernel says of a capability: 0 when it is not there."""
        return self.call(CHECK_EXTENSION, int(capability))

    def require(self, capabilities: Iterable[Capability]) -> None:
        """Check that all of `capabilities` are there.

        :raise Unsupported: When some are not; the text names them.
        """
        missing = [f"KVM_CAP_{cap.name}" for cap in capabilities if not self.check(cap)]
        if missing:
            raise Unsupported(
                f"this kernel's KVM lacks {', '.join(missing)}, which sterna needs; a newer kernel has it"
            )

    def vcpu_mapping_bytes(self) -> int:
        """Size of what a vCPU's descriptor maps at offset 0."""
        return self.call(GET_VCPU_MMAP_SIZE)

    def create_vm(self) -> Descriptor:
        """A VM without memory and vCPUs, of the architecture's usual type."""
        return Descriptor(self.call(CREATE_VM))


def _advice(error: int) -> str:
    if error == errno.ENOENT:
        return " (is virtualisation switched on in the firmware, and the module kvm_intel or kvm_amd loaded?)"
    if error in (errno.EACCES, errno.EPERM):
        return " (add yourself to the group kvm)"
    if error == errno.ENODEV:
        return " (this CPU has no virtualisation, or another hypervisor has taken it)"
    return ""


def capability_of(descriptor: Descriptor, capability: Capability) -> int:
    """What the kernel says of a capability for one VM, which may differ from what it says of the system."""
    return descriptor.call(CHECK_EXTENSION, int(capability))


def enable(descriptor: Descriptor, capability: Capability, *arguments: int) -> None:
    """Switch a capability on, for a VM or a vCPU.

    :raise KvmError: When the kernel refuses.
    """
    request = EnableCapability(cap=int(capability))
    for position, argument in enumerate(arguments):
        request.args[position] = argument
    error, _ = descriptor.attempt(ENABLE_CAP, request)
    if error:
        named = Request(f"KVM_ENABLE_CAP, KVM_CAP_{capability.name}", ENABLE_CAP.number)
        raise KvmError(named, arguments[0] if arguments else 0, error)
