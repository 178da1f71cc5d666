"""The hypervisor's interface, in KVM's terms.

The emulated hypervisor and `/dev/kvm` answer the same calls with the same bitmaps. Numbers with KVM's names mean what they
mean there (Linux, Documentation/virt/kvm/api.rst).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Protocol

from sterna.memory.address import Ipa
from sterna.memory.bitmap import Words
from sterna.memory.ram import RamBlock


class HypervisorError(Exception):
    """A call the hypervisor refuses; the text names the call and the argument that is wrong."""


class SlotFlags(IntFlag):
    """Flags of a memory slot (KVM_MEM_*)."""

    NONE = 0
    LOG_DIRTY_PAGES = 1
    READONLY = 2


class ManualProtect(IntFlag):
    """Argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""

    OFF = 0
    ENABLE = 1
    INITIALLY_SET = 2


class ExitReason(IntEnum):
    """Why a vCPU left guest mode (KVM_EXIT_*)."""

    SHUTDOWN = 8
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24


class SystemEvent(IntEnum):
    """Kinds of SYSTEM_EVENT exit (KVM_SYSTEM_EVENT_*)."""

    SHUTDOWN = 1
    RESET = 2


@dataclass(frozen=True)
class Exit:
    """One return from guest mode.

    :ivar event: for SYSTEM_EVENT, which
    :ivar detail: for INTERNAL_ERROR, the report in one line: fault, address, pc
    """

    reason: ExitReason
    event: SystemEvent | None = None
    detail: str = ""


@dataclass(frozen=True)
class MemorySlot:
    """A range of guest memory (struct kvm_userspace_memory_region). A size of zero deletes the slot.

    :ivar slot: the slot's number
    :ivar ipa: guest physical address, a multiple of 4096
    :ivar size: bytes, a multiple of 4096
    :ivar block: the RAM behind it
    :ivar offset: where in `block` the slot starts, in bytes
    """

    slot: int
    ipa: Ipa
    size: int
    block: RamBlock
    offset: int = 0
    flags: SlotFlags = SlotFlags.NONE


class MmioDevice(Protocol):
    """A device behind a range of guest physical addresses. Called on the thread of the vCPU that made the access."""

    def mmio_read(self, offset: int, size: int, cpu: int) -> int:
        """The value that vCPU `cpu` reads from `offset`, `size` bytes wide."""
        ...

    def mmio_write(self, offset: int, size: int, value: int, cpu: int) -> None:
        """vCPU `cpu` writes `value` to `offset`, `size` bytes wide."""
        ...


class Vcpu(Protocol):
    """A virtual CPU. `run` belongs to one thread; `kick` and `wake` may be called from any."""

    index: int

    def run(self) -> Exit:
        """Run guest code until something needs the caller. A `kick` makes it return INTR, also one made before."""
        ...

    def kick(self) -> None:
        """Make `run` return soon (under 1 ms), wherever the vCPU is, `wfi` included."""
        ...

    def wake(self) -> None:
        """End a `wfi` of this vCPU (an interrupt is pending for it); `run` goes on."""
        ...

    def set_timer_wakes(self, enabled: bool) -> None:
        """Whether the virtual timer's interrupt reaches this vCPU, so that its expiry ends a `wfi`."""
        ...

    def get_state(self) -> "ArmVcpuState":
        """Everything the guest can see of this CPU. Call it while `run` is not running."""
        ...

    def set_state(self, state: "ArmVcpuState") -> None:
        """Replace the CPU's state. Call it while `run` is not running."""
        ...


@dataclass
class ArmVcpuState:
    """An ARMv7 CPU's registers, named as in the Architecture Reference Manual (ARM DDI 0406C, B1.3).

    :ivar regs: r0-r15 of the current mode; r15 is the address of the next instruction
    :ivar cpsr: the program status register, condition flags and Thumb bit included
    :ivar banked: the banked registers by name: ``r8_usr`` .. ``r12_usr``, ``sp_usr``, ``lr_usr``, ``r8_fiq`` .. ``r12_fiq``, and
        ``sp_``, ``lr_``, ``spsr_`` of fiq, irq, svc, abt and und; the bank of the current mode repeats `regs`
    :ivar cp15: system registers by KVM one-reg id (0x4020_0000_000f_xxxx for 32-bit, 0x4030_0000_000f_xxxx for 64-bit ones;
        Documentation/virt/kvm/api.rst, KVM_GET_ONE_REG), without the counter
    :ivar vfp: d0-d31 as 64-bit integers
    :ivar counter: CNTVCT at the moment the VM stopped, in ticks of `COUNTER_HZ`
    :ivar powered_off: PSCI has not started this CPU yet, or stopped it
    """

    regs: list[int]
    cpsr: int
    banked: dict[str, int]
    cp15: dict[int, int]
    vfp: list[int]
    fpscr: int
    fpexc: int
    counter: int
    powered_off: bool = False


COUNTER_HZ = 62_500_000
"""Frequency of the generic timer, as in QEMU's `virt` board."""


class Vm(Protocol):
    """A virtual machine: memory slots with their dirty logs, and vCPUs."""

    def set_memory_slot(self, slot: MemorySlot) -> None:
        """Create, move, re-flag or (size zero) delete a slot.

        :raise HypervisorError: When it overlaps another slot, is not page aligned, or lies outside its RAM block.
        """
        ...

    def get_dirty_log(self, slot: int) -> Words:
        """KVM_GET_DIRTY_LOG: the slot's dirty bitmap, an owned copy.

        Without manual protect the log is cleared, the pages are protected again and the TLBs flushed before it returns.

        :raise HypervisorError: When there is no such slot, or it has no log (ENOENT).
        """
        ...

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, words: Words) -> None:
        """KVM_CLEAR_DIRTY_LOG: clear the bits set in `words` (bit 0 is `first_page`) and protect those pages again.

        :raise HypervisorError: When the range is not 64-page aligned (save at the slot's end), or manual protect is off.
        """
        ...

    def enable_manual_protect(self, flags: ManualProtect) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; INITIALLY_SET needs ENABLE."""
        ...

    def mark_dirty(self, slot: int, first_page: int, num_pages: int) -> None:
        """Log a write that the host made to guest memory (device, loader)."""
        ...

    def create_vcpu(self, index: int) -> Vcpu:
        """Add vCPU number `index`, counted from 0."""
        ...

    def add_mmio(self, ipa: Ipa, size: int, device: MmioDevice) -> None:
        """Put a device at a page-aligned range of guest physical addresses."""
        ...

    def counter(self) -> int:
        """The guests' virtual counter (CNTVCT) now, in ticks of `COUNTER_HZ`."""
        ...

    def set_counter(self, value: int) -> None:
        """Make the virtual counter continue from `value`, now (CNTVOFF). No vCPU may be running."""
        ...

    def statistics(self) -> Mapping[str, int]:
        """Counters by name, named in ARCHITECTURE.md: pages mapped by size, faults by kind, protects, flushes."""
        ...

    def close(self) -> None:
        """Free the VM. No vCPU may be running."""
        ...
