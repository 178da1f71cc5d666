"""General, segment, control and debug registers, pending events and MP state (Documentation/virt/kvm/api.rst, 4.11 to 4.12)."""

import ctypes
from typing import Any

from sterna.arch.x86_64.state import (
    CONTROL_REGISTERS,
    EVENT_PARTS,
    GENERAL_REGISTERS,
    SEGMENT_PARTS,
    SEGMENTS,
)
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


def _events(names: str) -> list[tuple[str, type[Any]]]:
    return [(name, _UNSIGNED[EVENT_PARTS[name]]) for name in names.split()]


class VcpuEvents(ctypes.Structure):
    """struct kvm_vcpu_events, flattened"""

    _fields_ = (
        *_events("exception_injected exception_nr exception_has_error_code exception_pending"),
        *_events("exception_error_code interrupt_injected interrupt_nr interrupt_soft interrupt_shadow"),
        *_events("nmi_injected nmi_pending nmi_masked"),
        ("nmi_pad", ctypes.c_uint8),
        *_events(
            "sipi_vector flags smi_smm smi_pending smi_inside_nmi smi_latched_init triple_fault_pending"
        ),
        ("reserved", ctypes.c_uint8 * 26),
        *_events("exception_has_payload exception_payload"),
    )


GET_REGS = ior("KVM_GET_REGS", 0x81, Regs)
SET_REGS = iow("KVM_SET_REGS", 0x82, Regs)
GET_SREGS = ior("KVM_GET_SREGS", 0x83, Sregs)
SET_SREGS = iow("KVM_SET_SREGS", 0x84, Sregs)
GET_VCPU_EVENTS = ior("KVM_GET_VCPU_EVENTS", 0x9F, VcpuEvents)
SET_VCPU_EVENTS = iow("KVM_SET_VCPU_EVENTS", 0xA0, VcpuEvents)
GET_DEBUGREGS = ior("KVM_GET_DEBUGREGS", 0xA1, DebugRegs)
SET_DEBUGREGS = iow("KVM_SET_DEBUGREGS", 0xA2, DebugRegs)


def instruction_pointer(vcpu: Descriptor) -> int:
    """Address of the next instruction."""
    regs = Regs()
    vcpu.call(GET_REGS, regs)
    return int(regs.rip)
