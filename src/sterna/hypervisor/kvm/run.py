"""KVM_RUN, what it leaves in the page it shares with us, the signal that ends it, and whether a vCPU runs at all
(Documentation/virt/kvm/api.rst, 4.10, 4.38, 4.39, 5).
"""

import ctypes
import signal
from enum import IntEnum

from sterna.hypervisor.kvm.ioctl import Descriptor, io, ior, iow

RUN = io("KVM_RUN", 0x80)

KICK_SIGNAL = signal.SIGRTMIN + 3
"""Blocked in every thread that runs a vCPU, save inside KVM_RUN, which it ends: so it needs no handler, and none can be lost."""

_KERNEL_SIGSET_BYTES = 8


class ExitCode(IntEnum):
    """KVM_EXIT_* in `exit_reason`."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    ARM_NISV = 28
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    MEMORY_FAULT = 39


class MpState(ctypes.Structure):
    """struct kvm_mp_state"""

    _fields_ = (("mp_state", ctypes.c_uint32),)


GET_MP_STATE = ior("KVM_GET_MP_STATE", 0x98, MpState)
SET_MP_STATE = iow("KVM_SET_MP_STATE", 0x99, MpState)


class Mmio(ctypes.Structure):
    """kvm_run.mmio"""

    _fields_ = (
        ("phys_addr", ctypes.c_uint64),
        ("data", ctypes.c_uint8 * 8),
        ("len", ctypes.c_uint32),
        ("is_write", ctypes.c_uint8),
    )


class PortIo(ctypes.Structure):
    """kvm_run.io"""

    _fields_ = (
        ("direction", ctypes.c_uint8),
        ("size", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("count", ctypes.c_uint32),
        ("data_offset", ctypes.c_uint64),
    )


class FailEntry(ctypes.Structure):
    """kvm_run.fail_entry"""

    _fields_ = (("hardware_entry_failure_reason", ctypes.c_uint64), ("cpu", ctypes.c_uint32))


class InternalError(ctypes.Structure):
    """kvm_run.internal"""

    _fields_ = (("suberror", ctypes.c_uint32), ("ndata", ctypes.c_uint32), ("data", ctypes.c_uint64 * 16))


class SystemEventData(ctypes.Structure):
    """kvm_run.system_event"""

    _fields_ = (("type", ctypes.c_uint32), ("ndata", ctypes.c_uint32), ("data", ctypes.c_uint64 * 16))


class ArmNisv(ctypes.Structure):
    """kvm_run.arm_nisv: a data abort without the syndrome that emulating the access would need."""

    _fields_ = (("esr_iss", ctypes.c_uint64), ("fault_ipa", ctypes.c_uint64))


class MemoryFault(ctypes.Structure):
    """kvm_run.memory_fault"""

    _fields_ = (("flags", ctypes.c_uint64), ("gpa", ctypes.c_uint64), ("size", ctypes.c_uint64))


class _ExitData(ctypes.Union):
    _fields_ = (
        ("mmio", Mmio),
        ("io", PortIo),
        ("fail_entry", FailEntry),
        ("internal", InternalError),
        ("system_event", SystemEventData),
        ("arm_nisv", ArmNisv),
        ("memory_fault", MemoryFault),
        ("padding", ctypes.c_char * 256),
    )


class KvmRun(ctypes.Structure):
    """struct kvm_run"""

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", ctypes.c_uint8),
        ("immediate_exit", ctypes.c_uint8),
        ("padding1", ctypes.c_uint8 * 6),
        ("exit_reason", ctypes.c_uint32),
        ("ready_for_interrupt_injection", ctypes.c_uint8),
        ("if_flag", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("cr8", ctypes.c_uint64),
        ("apic_base", ctypes.c_uint64),
        ("exit", _ExitData),
        ("kvm_valid_regs", ctypes.c_uint64),
        ("kvm_dirty_regs", ctypes.c_uint64),
        ("s", ctypes.c_char * 2048),
    )


class SignalMask(ctypes.Structure):
    """struct kvm_signal_mask with the kernel's sigset_t behind it"""

    _fields_ = (("len", ctypes.c_uint32), ("sigset", ctypes.c_uint8 * _KERNEL_SIGSET_BYTES))


class _SignalMaskHead(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint32),)


SET_SIGNAL_MASK = iow("KVM_SET_SIGNAL_MASK", 0x8B, _SignalMaskHead)


def let_signal_in(vcpu: Descriptor) -> None:
    """Let `KICK_SIGNAL` end this vCPU's KVM_RUN, and otherwise none that the calling thread blocks."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    bits = sum(1 << number - 1 for number in blocked if number != KICK_SIGNAL)
    mask = SignalMask(
        _KERNEL_SIGSET_BYTES, (ctypes.c_uint8 * _KERNEL_SIGSET_BYTES)(*bits.to_bytes(8, "little"))
    )
    vcpu.call(SET_SIGNAL_MASK, mask)


def discard_signals() -> None:
    """Take back kicks that this thread has got and not seen."""
    while signal.sigtimedwait((KICK_SIGNAL,), 0) is not None:
        pass
