"""The hypervisor's interface, in KVM's terms.

The emulated hypervisor and `/dev/kvm` answer the same calls with the same bitmaps. Numbers with KVM's names mean what they
mean there (Linux, Documentation/virt/kvm/api.rst).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag, StrEnum
from typing import Protocol, TypeVar, runtime_checkable

from sterna.errors import Error
from sterna.hypervisor.traits import Trait
from sterna.memory.address import Ipa
from sterna.memory.bitmap import Words
from sterna.memory.ram import RamBlock

StateT = TypeVar("StateT")


class HypervisorError(Error):
    """A call the hypervisor refuses; the text names the call and the argument that is wrong."""


class Unsupported(HypervisorError):
    """This host, or this program, has not what a VM needs; nothing failed. The text says what is missing."""


class ArgumentError(HypervisorError):
    """An argument that no hypervisor takes: no integer, out of range, or no bitmap of the slot's."""


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


class DirtyLogMode(StrEnum):
    """How a VM keeps its dirty log.

    BITMAP: a bitmap per slot, taken and protected again in one call. MANUAL: a bitmap that is read in one call and cleared in
    another, range by range (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, INITIALLY_SET). RING: one ring of page numbers per vCPU
    (KVM_CAP_DIRTY_LOG_RING).
    """

    BITMAP = "bitmap"
    MANUAL = "manual"
    RING = "ring"


class ExitReason(IntEnum):
    """Why a vCPU left guest mode (KVM_EXIT_*)."""

    SHUTDOWN = 8
    FAIL_ENTRY = 9
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
    :ivar detail: for INTERNAL_ERROR, FAIL_ENTRY and SHUTDOWN, the report in one line: fault, address, pc
    """

    reason: ExitReason
    event: SystemEvent | None = None
    detail: str = ""


@dataclass(frozen=True)
class MemorySlot:
    """A range of guest memory (struct kvm_userspace_memory_region). A size of zero deletes the slot.

    :ivar slot: the slot's number
    :ivar ipa: guest physical address, a multiple of the log's page size
    :ivar size: bytes, a multiple of the log's page size
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
        """End this vCPU's sleep (`wfi`, `hlt`: an interrupt is pending for it); `run` goes on."""
        ...


class StatefulVcpu(Vcpu, Protocol[StateT]):
    """A vCPU whose architecture is known by the kind of its state."""

    def get_state(self) -> StateT:
        """Everything the guest can see of this CPU. Call it while `run` is not running."""
        ...

    def set_state(self, state: StateT) -> None:
        """Replace the CPU's state, all of it. Call it while `run` is not running.

        :raise HypervisorError: When this host cannot have it; the text names the register.
        """
        ...


@runtime_checkable
class HostPaging(Protocol):
    """A hypervisor whose host takes memory from guests through calls of ours, as a kernel does by MMU notifiers."""

    def unmap_range(self, ipa: Ipa, size: int) -> None:
        """Take the mappings of a range away; guests fault them in again."""
        ...

    def age_range(self, ipa: Ipa, size: int) -> int:
        """Clear the range's access flags: how many were set."""
        ...


class Vm(Protocol):
    """A virtual machine: memory slots with their dirty logs, and vCPUs.

    :ivar counter_hz: frequency of the guests' counter
    :ivar log_page_bits: bytes of a page of the dirty logs, as a power of two: on KVM, of the host kernel's pages. Calls take and
        return numbers and bitmaps of such pages
    """

    counter_hz: int
    log_page_bits: int

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

    def harvest_dirty_log(self, slot: int) -> Words:
        """Take the slot's dirty log, however this VM keeps it: an owned bitmap of the pages written since the harvest before.

        When it returns the log is clear, the pages are protected again and the TLBs flushed: what is written from now on is
        in the next harvest.

        :raise HypervisorError: As `get_dirty_log`.
        """
        ...

    def peek_dirty_log(self, slot: int) -> Words:
        """What the slot's dirty log holds now, an owned bitmap: the harvest that follows has at least these pages.

        All writes that were made before are in it when no vCPU runs. Where the kernel cannot show its log without clearing it
        (GET without manual protect), what it shows is merged back: those pages are protected once more, and none is lost.

        :raise HypervisorError: As `get_dirty_log`.
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
        """Log a write that the host made to guest memory (device, loader), after it was made. Waits for no vCPU that is in a
        device's `mmio_read` or `mmio_write`.
        """
        ...

    def create_vcpu(self, index: int) -> Vcpu:
        """Add vCPU number `index`, counted from 0."""
        ...

    def add_mmio(self, ipa: Ipa, size: int, device: MmioDevice) -> None:
        """Put a device at a page-aligned range of guest physical addresses."""
        ...

    def counter(self) -> int:
        """The guests' counter (ARM: CNTVCT, x86: the VM's clock) now, in ticks of `counter_hz`."""
        ...

    def set_counter(self, value: int) -> None:
        """Make the counter continue from `value`, now. No vCPU may be running."""
        ...

    def guest_traits(self) -> Sequence[Trait]:
        """What the guest may rely on of its CPU and hypervisor, and so needs wherever it goes. vCPUs may be running."""
        ...

    def host_traits(self) -> Mapping[str, int]:
        """What this host has for a guest, by the names of `Trait`. vCPUs may be running."""
        ...

    def statistics(self) -> Mapping[str, int]:
        """Counters by name, named in ARCHITECTURE.md: pages mapped by size, faults by kind, protects, flushes."""
        ...

    def close(self) -> None:
        """Free the VM. No vCPU may be running."""
        ...
