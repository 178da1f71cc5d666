"""A virtual machine of the emulated hypervisor: memory slots with dirty logs, vCPUs, devices."""

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np

from sterna.hypervisor import arguments
from sterna.hypervisor.architecture import ARCHITECTURES, DEFAULT
from sterna.hypervisor.emulated import guestmode
from sterna.hypervisor.emulated.engine import Engine
from sterna.hypervisor.emulated.tlbsize import TlbSizing
from sterna.hypervisor.emulated.vcpu import EmulatedVcpu
from sterna.hypervisor.interface import (
    HypervisorError,
    ManualProtect,
    MemorySlot,
    MmioDevice,
    SlotFlags,
)
from sterna.hypervisor.memorymap import MemoryMap
from sterna.hypervisor.traits import Trait
from sterna.jit.ahead import fetch_kernels
from sterna.memory.address import PMD_SIZE, PUD_SIZE, Ipa
from sterna.memory.bitmap import Words
from sterna.memory.ram import RamBlock
from sterna.stage2.dirtylog import DirtyLog, DirtyLogError
from sterna.stage2.state import MAX_CPUS
from sterna.stage2.tables import OutOfTablesError, Stage2
from sterna.stage2.tlb import BroadcastFlush, GenericFlush, RemoteTlbFlush

# The emulated machine's physical memory map: 40 bits, nothing where an IPA of a 32-bit guest could be taken for it.
_DEVICE_PA = 0x08_0000_0000
_POOL_PA = 0x10_0000_0000
_RAM_PA = 0x20_0000_0000
_PA_END = 1 << 40
_COUNTER_MASK = (1 << 64) - 1

_making = threading.Lock()
_vms: "weakref.WeakSet[EmulatedVm]" = weakref.WeakSet()
"""Those of this process that have not been closed."""


class _Hardware:
    """The CPUs' interconnect, which carries TLB maintenance from one to all."""

    def __init__(self, stage2: Stage2) -> None:
        self._tlbi = stage2.tlbi_pending.ctypes.data
        self._records: np.ndarray[tuple[int], np.dtype[np.int64]] = np.zeros(0, dtype=np.int64)

    def attach(self, cpus: Sequence[EmulatedVcpu]) -> None:
        """The CPUs that a broadcast reaches."""
        self._records = np.array([cpu.record.ctypes.data for cpu in cpus], dtype=np.int64)

    def broadcast_tlbi(self) -> None:
        """TLBIALLIS; DSB ISH."""
        guestmode.broadcast_tlbi(self._records, self._tlbi)


class EmulatedVm:
    """A VM on emulated CPUs; see the interface for its calls.

    :cvar log_class: makes the dirty logs of slots
    :cvar log_page_bits: of a kind of VM whose log has other pages than its tables
    :ivar cpus: the vCPUs, by index

    :param smp: how many vCPUs there will be, 1 to 8
    :param arch: of its CPUs, one that has emulated ones
    :param generic_flush: flush by requests to vCPUs instead of ARM's broadcast
    :param max_leaf: the largest stage-2 leaf: 4 KiB, 2 MiB or 1 GiB
    :param secondaries_off: vCPUs other than 0 wait until the guest starts them
    """

    log_class: ClassVar[type[DirtyLog]] = DirtyLog
    log_page_bits = 0

    def __init__(
        self,
        smp: int = 1,
        *,
        arch: str = DEFAULT,
        generic_flush: bool = False,
        max_leaf: int = PMD_SIZE,
        secondaries_off: bool = True,
    ) -> None:
        if not 1 <= arguments.integer("vCPUs", smp) <= MAX_CPUS:
            raise HypervisorError(f"{smp} vCPUs: 1 to {MAX_CPUS} are possible")
        architecture = ARCHITECTURES.get(arch)
        assert architecture.emulated is not None
        assert architecture.stage2 is not None
        self._cpu_class: type[Engine[Any]] = architecture.emulated.load()
        self.counter_hz = self._cpu_class.counter_hz
        self.log_page_bits = self.log_page_bits or architecture.stage2.shifts[-1]
        self.stage2 = Stage2(architecture.stage2, _POOL_PA, cpus=smp, max_leaf=max_leaf)
        self._smp = smp
        self._secondaries_off = secondaries_off
        self._hardware = _Hardware(self.stage2)
        self.cpus: list[EmulatedVcpu] = []
        self.flush: RemoteTlbFlush = (
            GenericFlush(self.cpus) if generic_flush else BroadcastFlush(self._hardware)
        )
        self._map = MemoryMap(self._cpu_class.ipa_bits, log_page_bits=self.log_page_bits)
        self._logs: dict[int, DirtyLog] = {}
        self._manual = ManualProtect.OFF
        # RAM blocks by the physical address at which the machine has them.
        self._ram: dict[int, RamBlock] = {}
        self._counter_offset = 0
        # slots_lock: one change of the memory map, and one harvest, at a time.
        self._lock = threading.RLock()
        self._released = threading.Event()
        self._released.set()
        self.tlb_sizing = TlbSizing(self._hardware.broadcast_tlbi)
        # Now, not when a vCPU is first stopped or a log first read.
        fetch_kernels()
        with _making:
            _vms.add(self)

    # -- memory slots --------------------------------------------------------------------------------------------------

    def set_memory_slot(self, slot: MemorySlot) -> None:
        """KVM_SET_USER_MEMORY_REGION: create, move, re-flag or delete a slot."""
        with self._lock:
            slot, old = self._map.check_slot(slot)
            if old is None:
                self._create(slot)
            elif not slot.size:
                self._delete(old)
            elif old.ipa != slot.ipa:
                self._move(slot)
            else:
                self._set_logging(slot)

    def _create(self, slot: MemorySlot) -> None:
        self._insert(slot, None)
        self._set_logging(slot)

    def _insert(self, slot: MemorySlot, bitmap: Words | None) -> None:
        pa = self._physical(slot.block) + slot.offset
        readonly = bool(slot.flags & SlotFlags.READONLY)
        try:
            self.stage2.insert_slot(slot.slot, slot.ipa, slot.size, pa, readonly=readonly, bitmap=bitmap)
        except OutOfTablesError as error:
            self._forget_unused(slot.block)
            raise HypervisorError(str(error)) from error

    def _move(self, slot: MemorySlot) -> None:
        # The log goes on: its bitmap leaves with the slot's record and comes back with the new one.
        self.stage2.remove_slot(slot.slot)
        self.stage2.flush_tlbs(self.flush)
        log = self._logs.get(slot.slot)
        self._insert(slot, None if log is None else log.move(slot.ipa))
        self._set_logging(slot)

    def _delete(self, slot: MemorySlot) -> None:
        self._stop_log(slot)
        self._map.drop(slot.slot)
        self.stage2.remove_slot(slot.slot)
        self.stage2.flush_tlbs(self.flush)
        self._forget_unused(slot.block)

    def _set_logging(self, slot: MemorySlot) -> None:
        self._map.put(slot)
        wanted = bool(slot.flags & SlotFlags.LOG_DIRTY_PAGES)
        logs = slot.slot in self._logs
        if wanted and not logs:
            self._start_log(slot)
        elif logs and not wanted:
            self._stop_log(slot)

    def _start_log(self, slot: MemorySlot) -> None:
        self._logs[slot.slot] = self.log_class(
            self.stage2,
            self.flush,
            slot.slot,
            slot.ipa,
            slot.size >> self.log_page_bits,
            manual_protect=bool(self._manual & ManualProtect.ENABLE),
            initially_set=bool(self._manual & ManualProtect.INITIALLY_SET),
        )

    def _stop_log(self, slot: MemorySlot) -> None:
        log = self._logs.pop(slot.slot, None)
        if log is not None:
            log.disable()

    def _physical(self, block: RamBlock) -> int:
        """Where the machine has a RAM block, put there on first use; 1 GiB aligned like the largest leaf."""
        pa = _RAM_PA
        for start, known in sorted(self._ram.items()):
            if known is block:
                return start
            if start - pa < block.size:
                pa = start + -(-known.size // PUD_SIZE) * PUD_SIZE
        if pa + block.size > _PA_END:
            raise HypervisorError(
                f"RAM block {block.name!r}: no room left in the 40-bit physical address space"
            )
        with self._vcpus_held():
            for cpu in self.cpus:
                cpu.engine.map_ram(pa, block)
        self._ram[pa] = block
        return pa

    def _forget_unused(self, block: RamBlock) -> None:
        """Take a RAM block out of the machine unless a slot has it: its owner may close it. No TLB leads there any more."""
        if any(slot.block is block for slot in self._map.slots.values()):
            return
        pa = self._physical(block)
        with self._vcpus_held():
            for cpu in self.cpus:
                cpu.engine.unmap_ram(pa, block)
        del self._ram[pa]

    @contextmanager
    def _vcpus_held(self) -> Iterator[None]:
        """All vCPUs out of guest mode, however many are running."""
        self._released.clear()
        try:
            for cpu in self.cpus:
                cpu.hold()
            yield
        finally:
            self._released.set()

    def await_release(self) -> None:
        """For a vCPU that was told to hold."""
        self._released.wait()

    # -- dirty log -----------------------------------------------------------------------------------------------------

    def get_dirty_log(self, slot: int) -> Words:
        """KVM_GET_DIRTY_LOG."""
        with self._lock:
            return self._log(slot).get()

    def harvest_dirty_log(self, slot: int) -> Words:
        """Take the log; where its protection is manual, clear what was found."""
        with self._lock:
            words = self.get_dirty_log(slot)
            if self._log(slot).manual:
                self.clear_dirty_log(slot, 0, self._map.slot(slot).size >> self.log_page_bits, words)
            return words

    def peek_dirty_log(self, slot: int) -> Words:
        """A copy of the log."""
        with self._lock:
            return self._log(slot).peek()

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, words: Words) -> None:
        """KVM_CLEAR_DIRTY_LOG."""
        with self._lock:
            log, there = self._log(slot), self._map.slot(slot)
            first, count, mask = arguments.clear_range(
                f"memory slot {slot}", first_page, num_pages, there.size >> self.log_page_bits, words
            )
            try:
                log.clear(first, count, mask)
            except DirtyLogError as error:
                raise HypervisorError(f"memory slot {slot}: {error}") from error

    def mark_dirty(self, slot: int, first_page: int, num_pages: int) -> None:
        """Log a write by the host; without a log there is nothing to do.

        Takes no lock: a device may call it while a vCPU waits for that device in guest mode, and who holds the lock may wait
        for that vCPU to flush its TLB. A log that starts meanwhile need not have the write, which came before.
        """
        pages = self._map.slot(slot).size >> self.log_page_bits
        first, count = arguments.page_range(f"memory slot {slot}", first_page, num_pages, pages)
        log = self._logs.get(slot)
        if log is not None:
            log.mark(first, count)

    def enable_manual_protect(self, flags: ManualProtect) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, for logs that start from now on."""
        flags = arguments.manual_protect(flags)
        with self._lock:
            self._manual = flags

    def _log(self, slot: int) -> DirtyLog:
        self._map.slot(slot)
        if slot not in self._logs:
            raise HypervisorError(f"memory slot {slot}: its dirty log is off (ENOENT)")
        return self._logs[slot]

    # -- the host's own page management: of memory; a device in the range stays ----------------------------------------

    def unmap_range(self, ipa: Ipa, size: int) -> None:
        """The host takes pages away (an MMU notifier's invalidate): absent, and flushed, before this returns."""
        ipa, size = self._map.check_range(ipa, size)
        with self._lock:
            for start, length in self._map.memory_in(ipa, size):
                self.stage2.unmap(start, length)
            self.stage2.flush_tlbs(self.flush)

    def age_range(self, ipa: Ipa, size: int) -> int:
        """The host asks which leaves were used (clear_young): how many, with their access flags cleared."""
        ipa, size = self._map.check_range(ipa, size)
        with self._lock:
            return sum(self.stage2.age(start, length) for start, length in self._map.memory_in(ipa, size))

    def reclaim_tables(self) -> bool:
        """For a vCPU that found no page-table page, out of guest mode: whether to try again. Takes no lock that a vCPU in guest
        mode may wait for.
        """
        return self.stage2.reclaim(self.flush)

    # -- vCPUs, devices, time ------------------------------------------------------------------------------------------

    def create_vcpu(self, index: int) -> EmulatedVcpu:
        """Add the next vCPU; its index says which."""
        with _all_held(), self._lock:
            index = arguments.vcpu_index(index, len(self.cpus), self._smp)
            off = self._secondaries_off and index > 0
            cpu = EmulatedVcpu(self, self._cpu_class, index, self.stage2, powered_off=off)
            for pa, block in self._ram.items():
                cpu.engine.map_ram(pa, block)
            for ipa, size, device in self._map.devices:
                self._attach(cpu, ipa, size, device)
            cpu.engine.set_counter_offset(self._counter_offset)
            self.cpus.append(cpu)
            self._hardware.attach(self.cpus)
            return cpu

    def add_mmio(self, ipa: Ipa, size: int, device: MmioDevice) -> None:
        """Put a device at a page-aligned range."""
        with self._lock, self._vcpus_held():
            ipa, size = self._map.check_device(ipa, size)
            self.reclaim_tables()
            try:
                self.stage2.map_device(ipa, size, _DEVICE_PA + ipa)
            except OutOfTablesError as error:
                raise HypervisorError(str(error)) from error
            self._map.add_device(ipa, size, device)
            for cpu in self.cpus:
                self._attach(cpu, ipa, size, device)

    @staticmethod
    def _attach(cpu: EmulatedVcpu, ipa: Ipa, size: int, device: MmioDevice) -> None:
        cpu.engine.map_device(_DEVICE_PA + ipa, size, device, cpu.index, cpu.kick)

    def counter(self) -> int:
        """CNTVCT now."""
        return (self._cpu_class.physical_counter() - self._counter_offset) & _COUNTER_MASK

    def set_counter(self, value: int) -> None:
        """Let CNTVCT go on from `value`, on every vCPU alike."""
        self._counter_offset = self._cpu_class.physical_counter() - arguments.integer("counter", value)
        for cpu in self.cpus:
            cpu.engine.set_counter_offset(self._counter_offset)

    def read_physical(self, ipa: Ipa, size: int) -> bytes | None:
        """Guest memory, or None when the range is not in one slot."""
        return self._map.read(ipa, size)

    def guest_traits(self) -> Sequence[Trait]:
        """The CPU's."""
        return self._cpu_class.traits

    def host_traits(self) -> Mapping[str, int]:
        """The same of each host."""
        return {trait.name: trait.value for trait in self._cpu_class.traits}

    def statistics(self) -> Mapping[str, int]:
        """Counters of stage 2, TLB flushes and vCPUs."""
        records = [cpu.record[0] for cpu in self.cpus]
        counters = self.flush.counters
        return {
            **self.stage2.statistics(),
            "flushes": counters.flushes,
            "flush_requests": counters.requests,
            "flush_vcpu_exits": counters.vcpu_exits,
            "flush_broadcasts": counters.broadcasts,
            "vcpu_entries": sum(int(record["entries"]) for record in records),
            "vcpu_wfis": sum(int(record["wfis"]) for record in records),
            "vcpu_tlb_flushes": sum(int(record["tlb_flushes"]) for record in records),
        }

    def close(self) -> None:
        """Free the vCPUs. None may be running."""
        with _making:
            _vms.discard(self)
        self.tlb_sizing.end()
        for cpu in self.cpus:
            cpu.close()


@contextmanager
def _all_held() -> Iterator[None]:
    """All vCPUs of this process out of guest mode, and no others made meanwhile.

    With each engine Unicorn sets up the clock of all (2.1.4, init_get_clock in qemu/util/qemu-timer-common.c): for a moment that
    is the time of day, and not the monotonic one. A guest that read its counter then, or set its timer by it, would be decades
    ahead.
    """
    with _making, ExitStack() as stack:
        for vm in tuple(_vms):
            stack.enter_context(vm._lock)
            stack.enter_context(vm._vcpus_held())
        yield
