"""A VM of the kernel's: what all architectures share."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar

import numpy as np

from sterna.hypervisor import arguments
from sterna.hypervisor.interface import (
    DirtyLogMode,
    HypervisorError,
    ManualProtect,
    MemorySlot,
    MmioDevice,
    SlotFlags,
    Unsupported,
)
from sterna.hypervisor.kvm.dirtylog import LOG_PAGE_SHIFT, BitmapLog
from sterna.hypervisor.kvm.dirtyring import LARGEST_RING, RingLog
from sterna.hypervisor.kvm.ioctl import Descriptor, io
from sterna.hypervisor.kvm.memslots import set_memory_slot
from sterna.hypervisor.kvm.stats import Statistics
from sterna.hypervisor.kvm.system import DEVICE, Capability, System, capability_of
from sterna.hypervisor.kvm.vcpu import KvmVcpu
from sterna.hypervisor.memorymap import MemoryMap
from sterna.hypervisor.traits import Trait
from sterna.memory.address import BITS_PER_WORD, Ipa
from sterna.memory.bitmap import Words, new_bitmap, set_range

CREATE_VCPU = io("KVM_CREATE_VCPU", 0x41)

_LOG = SlotFlags.LOG_DIRTY_PAGES


class KvmVm(ABC):
    """A VM on this host's CPUs; see the interface for its calls.

    :cvar counters: the kernel's statistics that there are, and the names that they have here
    :ivar system: the open /dev/kvm
    :ivar fd: the VM's descriptor
    :ivar memory: what is where
    :ivar cpus: the vCPUs, by index

    :param smp: how many vCPUs there will be
    :param dirty_log: how the kernel keeps the dirty log
    :param secondaries_off: vCPUs other than 0 wait until the guest starts them, where the architecture has a call for that
    :param ring_entries: size of each dirty ring, a power of two
    :param device: KVM's device file
    :raise Unsupported: When this host cannot have the VM; the text says what is missing.
    """

    counters: ClassVar[Mapping[str, str]]
    counter_hz: int
    log_page_bits = LOG_PAGE_SHIFT
    _required: ClassVar[tuple[Capability, ...]] = (
        Capability.USER_MEMORY,
        Capability.DESTROY_MEMORY_REGION_WORKS,
        Capability.SYNC_MMU,
        Capability.READONLY_MEM,
        Capability.IMMEDIATE_EXIT,
    )

    def __init__(
        self,
        smp: int = 1,
        *,
        dirty_log: DirtyLogMode = DirtyLogMode.BITMAP,
        secondaries_off: bool = True,
        ring_entries: int = LARGEST_RING,
        device: str = DEVICE,
    ) -> None:
        self._smp = smp
        self._secondaries_off = secondaries_off
        self.cpus: list[KvmVcpu] = []
        # slots_lock: one change of the memory map, and one harvest, at a time.
        self._lock = threading.RLock()
        # What the next harvest has besides the kernel's log: what the host itself has written, which the kernel does not log,
        # and what a peek, or a harvest that failed, has taken from it.
        self._host: dict[int, Words] = {}
        self._statistics: list[Statistics] = []
        with ExitStack() as stack:
            self.system = System(device)
            stack.callback(self.system.close)
            self.system.require(self._required)
            most = self.system.check(Capability.MAX_VCPUS) or self.system.check(Capability.NR_VCPUS)
            if not 1 <= arguments.integer("vCPUs", smp) <= most:
                raise Unsupported(f"{smp} vCPUs: this host's KVM has 1 to {most}")
            self.fd: Descriptor = stack.enter_context(self.system.create_vm())
            self.memory = MemoryMap(self._ipa_bits(), log_page_bits=self.log_page_bits)
            self._bitmap = BitmapLog(self.fd)
            self._ring: RingLog | None = None
            if dirty_log is DirtyLogMode.RING:
                self._ring = RingLog(self.fd, ring_entries)
                stack.callback(self._ring.close)
            elif dirty_log is DirtyLogMode.MANUAL:
                self.enable_manual_protect(ManualProtect.ENABLE | ManualProtect.INITIALLY_SET)
            self._set_up()
            self._resources = stack.pop_all()
        self._count(self.fd)

    # -- what an architecture adds -------------------------------------------------------------------------------------

    def _ipa_bits(self) -> int:
        """Width of a guest physical address, unless the architecture says more."""
        return 40

    @abstractmethod
    def _set_up(self) -> None:
        """What is to be done to a new VM before it has vCPUs and slots."""

    @abstractmethod
    def _make_vcpu(self, fd: Descriptor, index: int, mapping_bytes: int) -> KvmVcpu:
        """A vCPU around its descriptor, in the state that it starts with."""

    @abstractmethod
    def counter(self) -> int:
        """The guests' counter now."""

    @abstractmethod
    def set_counter(self, value: int) -> None:
        """Let the guests' counter go on from `value`."""

    def guest_traits(self) -> Sequence[Trait]:
        """What the first vCPU's guest may rely on, and so that of all."""
        return self.cpus[0].traits

    def host_traits(self) -> dict[str, int]:
        """The same of this host."""
        return {trait.name: trait.value for trait in self.guest_traits()}

    # -- memory slots --------------------------------------------------------------------------------------------------

    def set_memory_slot(self, slot: MemorySlot) -> None:
        """KVM_SET_USER_MEMORY_REGION: create, move, re-flag or delete a slot."""
        with self._lock:
            slot, old = self.memory.check_slot(slot)
            if old is not None and not slot.size:
                set_memory_slot(self.fd, slot)
                self.memory.drop(slot.slot)
                self._stop_log(old)
                return
            was_logged = old is not None and bool(old.flags & _LOG)
            if slot.flags & _LOG and not was_logged:
                self._start_log(slot)
            try:
                set_memory_slot(self.fd, slot)
            except HypervisorError:
                if not was_logged:
                    self._stop_log(slot)
                raise
            self.memory.put(slot)
            if was_logged and not slot.flags & _LOG:
                self._stop_log(slot)

    def is_in_slot(self, ipa: int) -> bool:
        """Whether there is memory, once no change of the slots is under way."""
        with self._lock:
            return self.memory.slot_at(ipa, 1) is not None

    def _start_log(self, slot: MemorySlot) -> None:
        if self._ring is not None:
            self._ring.start(slot)

    def _stop_log(self, slot: MemorySlot) -> None:
        self._host.pop(slot.slot, None)
        if self._ring is not None:
            self._ring.stop(slot)

    # -- dirty log -----------------------------------------------------------------------------------------------------

    def get_dirty_log(self, slot: int) -> Words:
        """KVM_GET_DIRTY_LOG."""
        with self._lock:
            words = self._bitmap.get(self.memory.slot(slot))
            host = self._host.get(slot) if self._bitmap.manual else self._host.pop(slot, None)
            return words if host is None else words | host

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, words: Words) -> None:
        """KVM_CLEAR_DIRTY_LOG."""
        with self._lock:
            there = self.memory.slot(slot)
            first, count, mask = arguments.clear_range(
                f"memory slot {slot}", first_page, num_pages, there.size >> self.log_page_bits, words
            )
            self._bitmap.clear(there, first, count, mask)
            if slot in self._host:
                first //= BITS_PER_WORD
                self._host[slot][first : first + mask.size] &= ~mask

    def harvest_dirty_log(self, slot: int) -> Words:
        """Take the log, from the bitmap or the rings."""
        with self._lock:
            there = self.memory.slot(slot)
            if self._ring is None:
                words = self._bitmap.get(there)
                if self._bitmap.manual:
                    try:
                        self._bitmap.clear_found(there, words)
                    except HypervisorError:
                        self._keep(slot, words)
                        raise
            else:
                for cpu in self.cpus:
                    cpu.leave_guest()
                words = self._ring.harvest(there)
            host = self._host.pop(slot, None)
            return words if host is None else words | host

    def peek_dirty_log(self, slot: int) -> Words:
        """Peek at the log, in the bitmap or the rings.

        Where the bitmap is not cleared by hand the kernel cannot be asked without clearing it: it protects the pages that it
        finds, and flushes the TLBs when there are any.
        """
        with self._lock:
            there = self.memory.slot(slot)
            if self._ring is not None:
                for cpu in self.cpus:
                    cpu.leave_guest()
                words = self._ring.peek(there)
            else:
                words = self._bitmap.get(there)
                if not self._bitmap.manual:
                    self._keep(slot, words)
            host = self._host.get(slot)
            return words if host is None else words | host

    def _keep(self, slot: int, words: Words) -> None:
        """Keep bits for the next harvest that the kernel has cleared."""
        self._host[slot] = words | self._host.get(slot, np.uint64(0))

    def mark_dirty(self, slot: int, first_page: int, num_pages: int) -> None:
        """Log a write by the host; without a log there is nothing to do."""
        with self._lock:
            there = self.memory.slot(slot)
            pages = there.size >> self.log_page_bits
            first, count = arguments.page_range(f"memory slot {slot}", first_page, num_pages, pages)
            if there.flags & _LOG:
                set_range(self._host.setdefault(slot, new_bitmap(pages)), first, count)

    def enable_manual_protect(self, flags: ManualProtect) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, for logs that start from now on."""
        flags = arguments.manual_protect(flags)
        if not self.system.check(Capability.MANUAL_DIRTY_LOG_PROTECT2) & flags == flags:
            raise HypervisorError(
                "this kernel's KVM lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 as asked for; use another dirty log mode"
            )
        with self._lock:
            self._bitmap.enable_manual(flags)

    def drain_rings(self) -> None:
        """Empty the dirty rings: one is full, and its vCPU cannot go on."""
        assert self._ring is not None
        self._ring.drain()

    def hand_back_rings(self) -> None:
        """Hand all entries of the dirty rings back, and leave their pages unprotected: KVM_RESET_DIRTY_RINGS is the caller's."""
        assert self._ring is not None
        for cpu in self.cpus:
            cpu.leave_guest()
        self._ring.hand_back()

    # -- vCPUs and devices ---------------------------------------------------------------------------------------------

    def create_vcpu(self, index: int) -> KvmVcpu:
        """Add the next vCPU; its index says which."""
        with self._lock:
            index = arguments.vcpu_index(index, len(self.cpus), self._smp)
            fd = Descriptor(self.fd.call(CREATE_VCPU, index))
            with ExitStack() as stack:
                stack.callback(fd.close)
                cpu = self._make_vcpu(fd, index, self.system.vcpu_mapping_bytes())
                stack.callback(cpu.close)
                if self._ring is not None:
                    self._ring.add_vcpu(fd)
                stack.pop_all()
            self._resources.callback(cpu.close)
            self.cpus.append(cpu)
            self._count(fd)
            return cpu

    def add_mmio(self, ipa: Ipa, size: int, device: MmioDevice) -> None:
        """Put a device at a page-aligned range: accesses to where no slot is leave the guest."""
        with self._lock:
            ipa, size = self.memory.check_device(ipa, size)
            self.memory.add_device(ipa, size, device)

    # -- statistics, the end -------------------------------------------------------------------------------------------

    def statistics(self) -> Mapping[str, int]:
        """Counters of the kernel's; empty where it has none."""
        with self._lock:
            numbers: dict[str, int] = {}
            for statistics in self._statistics:
                for name, value in statistics.read().items():
                    numbers[name] = numbers.get(name, 0) + value
            return {ours: numbers[theirs] for theirs, ours in self.counters.items() if theirs in numbers}

    def _count(self, owner: Descriptor) -> None:
        """Open an owner's statistics while it does not run: a vCPU that does lets no call in until it leaves the guest."""
        if capability_of(self.fd, Capability.BINARY_STATS_FD):
            self._statistics.append(Statistics(owner))
            self._resources.callback(self._statistics[-1].close)

    def close(self) -> None:
        """Free the VM. No vCPU may be running."""
        self._resources.close()
