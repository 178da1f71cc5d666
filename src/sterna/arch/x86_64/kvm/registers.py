"""General, segment, control and debug registers, pending events and MP state (Documentation/virt/kvm/api.rst, 4.11 to 4.12)."""

import ctypes

from sterna.arch.x86_64.state import CONTROL_REGISTERS, GENERAL_REGISTERS, SEGMENT_PARTS, SEGMENTS
from sterna.hypervisor.kvm.ioctl import Descriptor, ior, iow

_UNSIGNED = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_uint32, 64: ctypes.c_uint64}


class Regs(ctypes.Structure):
    """struct kvm_regs"""

    _fields_ = tuple((name, ctypes.c_uint64) for name in GENERAL_REGISTERS)


class Segment(ctypes.Structure):
    """struct kvm_segment"""

    _fields_ = (
        *((name, _UNSIGNED[bits]) for name, bits in SEGMENT_PARTS.items()),
        ("padding", ctypes.c_uint8),
    )


class DescriptorTable(ctypes.Structure):
    """struct kvm_dtable"""

    _fields_ = (("base", ctypes.c_uint64), ("limit", ctypes.c_uint16), ("padding", ctypes.c_uint16 * 3))


class Sregs(ctypes.Structure):
    """struct kvm_sregs"""

    _fields_ = (
        *((name, Segment) for name in SEGMENTS),
        ("gdt", DescriptorTable),
        ("idt", DescriptorTable),
        *((name, ctypes.c_uint64) for name in CONTROL_REGISTERS),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    )


class DebugRegs(ctypes.Structure):
    """struct kvm_debugregs"""

    _fields_ = (
        ("db", ctypes.c_uint64 * 4),
        ("dr6", ctypes.c_uint64),
        ("dr7", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("reserved", ctypes.c_uint64 * 9),
    )


class MpState(ctypes.Structure):
    """struct kvm_mp_state"""

    _fields_ = (("mp_state", ctypes.c_uint32),)


class VcpuEvents(ctypes.Structure):
    """struct kvm_vcpu_events, flattened"""

    _fields_ = (
        ("exception_injected", ctypes.c_uint8),
        ("exception_nr", ctypes.c_uint8),
        ("exception_has_error_code", ctypes.c_uint8),
        ("exception_pending", ctypes.c_uint8),
        ("exception_error_code", ctypes.c_uint32),
        ("interrupt_injected", ctypes.c_uint8),
        ("interrupt_nr", ctypes.c_uint8),
        ("interrupt_soft", ctypes.c_uint8),
        ("interrupt_shadow", ctypes.c_uint8),
        ("nmi_injected", ctypes.c_uint8),
        ("nmi_pending", ctypes.c_uint8),
        ("nmi_masked", ctypes.c_uint8),
        ("nmi_pad", ctypes.c_uint8),
        ("sipi_vector", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("smi_smm", ctypes.c_uint8),
        ("smi_pending", ctypes.c_uint8),
        ("smi_inside_nmi", ctypes.c_uint8),
        ("smi_latched_init", ctypes.c_uint8),
        ("triple_fault_pending", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 26),
        ("exception_has_payload", ctypes.c_uint8),
        ("exception_payload", ctypes.c_uint64),
    )


GET_REGS = ior("KVM_GET_REGS", 0x81, Regs)
SET_REGS = iow("KVM_SET_REGS", 0x82, Regs)
GET_SREGS = ior("KVM_GET_SREGS", 0x83, Sregs)
SET_SREGS = iow("KVM_SET_SREGS", 0x84, Sregs)
GET_MP_STATE = ior("KVM_GET_MP_STATE", 0x98, MpState)
SET_MP_STATE = iow("KVM_SET_MP_STATE", 0x99, MpState)
GET_VCPU_EVENTS = ior("KVM_GET_VCPU_EVENTS", 0x9F, VcpuEvents)
SET_VCPU_EVENTS = iow("KVM_SET_VCPU_EVENTS", 0xA0, VcpuEvents)
GET_DEBUGREGS = ior("KVM_GET_DEBUGREGS", 0xA1, DebugRegs)
SET_DEBUGREGS = iow("KVM_SET_DEBUGREGS", 0xA2, DebugRegs)


def instruction_pointer(vcpu: Descriptor) -> int:
    """Address of the next instruction."""
    regs = Regs()
    vcpu.call(GET_REGS, regs)
    return int(regs.rip)
