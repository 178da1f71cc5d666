"""One VM's stage-2 tables: the memory they live in, the slots they map, and the calls that change them."""

import ctypes
import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.errors import Error
from sterna.jit.atomics import lock, unlock
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.stage2.change import map_device, unmap_range
from sterna.stage2.fault import FaultResult, handle_fault
from sterna.stage2.format import LAST_LEVEL, DescriptorFormat
from sterna.stage2.pool import LINK_SHIFT, begin_flush, end_flush
from sterna.stage2.protect import age_range, clear, harvest, mark_range, protect_range
from sterna.stage2.state import COUNTERS, MAX_CPUS, MAX_SLOTS, SLOT, STAGE2
from sterna.stage2.tlb import RemoteTlbFlush
from sterna.stage2.walk import find_leaf

_POOL_SIZE = 16 << 20
"""Enough tables to map the 4 GiB a 32-bit guest can reach in 4 KiB pages, and as much again. Host pages come on first use."""
_ABOVE_THE_ROOT = 62
"""See `shifts` of `STAGE2`."""


def _packed(shifts: Sequence[int]) -> int:
    """`shifts` of `STAGE2`."""
    return sum(shift << 8 * i for i, shift in enumerate((*reversed(shifts), _ABOVE_THE_ROOT)))


def _leaf_names(format: DescriptorFormat) -> dict[int, str]:
    """What statistics call the leaves of each level: by their size, as in ``pages_4k``, ``blocks_2m``."""
    names = {}
    for level in range(max(1, format.root_level), LAST_LEVEL + 1):
        shift = format.shift(level)
        kind = "pages" if level == LAST_LEVEL else "blocks"
        names[level] = f"{kind}_{1 << shift % 10}{'bkmgt'[shift // 10]}"
    return names


def _address(bitmap: NDArray[np.uint64] | None) -> int:
    return 0 if bitmap is None else bitmap.ctypes.data


class OutOfTablesError(Error):
    """The pool of page-table pages is used up."""


class Stage2:
    """Tables that a CPU's second-stage walker reads.

    :ivar state: one `STAGE2` record, for compiled code
    :ivar slots: `MAX_SLOTS` records of `SLOT`, the first ``state[0].slot_count`` in use
    :ivar tables: the pool's words, dtype int64
    :ivar pool_hva: the pool's address in this process
    :ivar tlbi_pending: one word a CPU: owes its TLB a flush

    :param pool_pa: physical address at which the CPU sees the pool
    :param max_leaf: the largest leaf to install, in bytes, of those that the format has; else a block of the level above pages
    :param pool_size: of the pool, in bytes: whole tables, the root table and at least one more
    :raise ValueError: When compiled code would reach beyond the pool, or beyond what there is for each CPU.
    """

    def __init__(
        self,
        format: DescriptorFormat,
        pool_pa: int,
        *,
        cpus: int = 1,
        max_leaf: int | None = None,
        pool_size: int = _POOL_SIZE,
    ) -> None:
        table_size = format.table_size
        root_tables = -(-format.root_entries * 8 // table_size)
        if pool_size % table_size or pool_size <= root_tables * table_size:
            raise ValueError(
                f"a pool of {pool_size} bytes: it has whole pages of {table_size} bytes, "
                f"more than the root's {root_tables * table_size}"
            )
        if not 1 <= cpus <= MAX_CPUS:
            raise ValueError(f"tables for {cpus} CPUs: 1 to {MAX_CPUS} are possible")
        self._memory = mmap.mmap(-1, pool_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        anchor = ctypes.c_char.from_buffer(self._memory)
        self.pool_hva = ctypes.addressof(anchor)
        self.pool_size = pool_size
        self.tables: NDArray[np.int64] = np.frombuffer(self._memory, dtype=np.int64)
        self.state: NDArray[Any] = np.zeros(1, dtype=STAGE2)
        self.slots: NDArray[Any] = np.zeros(MAX_SLOTS, dtype=SLOT)
        self.tlbi_pending: NDArray[np.int64] = np.zeros(MAX_CPUS, dtype=np.int64)
        state = self.state[0]
        offset = STAGE2.fields["lock"][1]  # type: ignore[index]
        state["lock_address"] = self.state.ctypes.data + offset
        state["sched_yield"] = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
        state["tlbi_address"] = self.tlbi_pending.ctypes.data
        self._seen: NDArray[np.int64] = np.zeros(MAX_CPUS, dtype=np.int64)
        state["seen_address"] = self._seen.ctypes.data
        state["cpus"] = cpus
        wanted = 1 << format.shift(LAST_LEVEL - 1) if max_leaf is None else max_leaf
        state["max_leaf"] = min(wanted, format.largest_leaf)
        for name in ("present", "kind", "table", "address", "write", "access", "page", "block"):
            state[name] = getattr(format, name)
        state["root_entries"], state["root_level"] = format.root_entries, format.root_level
        state["shifts"] = _packed(format.shifts)
        self.format = format
        self._leaf_names = _leaf_names(format)
        unused = {f"leaves_{level}" for level in range(1, format.root_level)}
        leaves = {f"leaves_{level}": leaf for level, leaf in self._leaf_names.items()}
        self._counters = {field: leaves.get(field, field) for field in COUNTERS if field not in unused}
        # Nobody who is in guest mode may wait for it: its holder waits for them.
        self._flush_lock = threading.Lock()
        self._make_pool(pool_pa, pool_size // table_size, root_tables)

    def _make_pool(self, pool_pa: int, pages: int, root_pages: int) -> None:
        state = self.state[0]
        state["pool_pa"], state["pool_pages"], state["root_pa"] = pool_pa, pages, pool_pa
        state["table_shift"] = self.format.table_size.bit_length() - 1
        # The root comes first, aligned to its own size; the rest is a list of free pages.
        self._root_pages = root_pages
        free = np.arange(root_pages, pages)
        self.tables[free * self._page_words] = np.append(free[1:] + 1, 0) << LINK_SHIFT
        state["pool_free"] = root_pages + 1

    @property
    def _page_words(self) -> int:
        return self.format.table_size // 8

    @property
    def root_pa(self) -> int:
        """Physical address of the first level's table, for the translation table base register."""
        return int(self.state[0]["root_pa"])

    # -- slots ---------------------------------------------------------------------------------------------------------

    def insert_slot(
        self,
        number: int,
        ipa: Ipa,
        size: int,
        pa: int,
        *,
        readonly: bool,
        bitmap: NDArray[np.uint64] | None = None,
    ) -> None:
        """Let faults populate [ipa, ipa + size) from physical address `pa`, and log into `bitmap` as by `set_bitmap`."""
        with self._locked():
            at = int(self.state[0]["slot_count"])
            if at == MAX_SLOTS:
                raise OutOfTablesError(f"memory slot {number}: at most {MAX_SLOTS} slots")
            self.slots[at] = (number, ipa, size, pa, readonly, _address(bitmap))
            self.state[0]["slot_count"] = at + 1

    def remove_slot(self, number: int) -> None:
        """Forget a slot and unmap its range. The caller flushes the TLBs."""
        with self._locked():
            at = self._index(number)
            slot = self.slots[at].copy()
            last = int(self.state[0]["slot_count"]) - 1
            self.slots[at] = self.slots[last]
            self.state[0]["slot_count"] = last
            unmap_range(self.state, self.tables, int(slot["ipa"]), int(slot["ipa"] + slot["size"]))

    def flush_tlbs(self, flush: RemoteTlbFlush) -> None:
        """Flush the TLBs, and let the tables that were taken out before be used again. Not in guest mode, nor under mmu_lock."""
        with self._flush_lock:
            self._flush(flush)

    def _flush(self, flush: RemoteTlbFlush) -> None:
        waited_for = begin_flush(self.state, self.tables)
        flush.flush_remote_tlbs()
        if waited_for:
            end_flush(self.state, self.tables)

    def reclaim(self, flush: RemoteTlbFlush) -> bool:
        """Flush the TLBs if pages of the pool wait for it: False when every page is in use. Called as `flush_tlbs`.

        Others may be faster and take the pages that this frees: try again, and come back, until it is False.
        """
        with self._flush_lock:
            with self._locked():
                state = self.state[0]
                free = bool(state["pool_free"])
                waiting = bool(state["pool_retired"] or state["pool_flushing"])
            if waiting:
                self._flush(flush)
            return free or waiting

    def set_bitmap(self, number: int, bitmap: NDArray[np.uint64] | None) -> None:
        """Start logging into `bitmap`, which must outlive the logging, or stop it. Stopping walks nothing."""
        with self._locked():
            self.slots[self._index(number)]["bitmap"] = _address(bitmap)

    # -- tables --------------------------------------------------------------------------------------------------------

    def map_device(self, ipa: Ipa, size: int, pa: int) -> None:
        """Map device memory, page by page, never executable. Nothing else is mapped in its range.

        :raise OutOfTablesError: When the pool has no page left; then none of it is mapped.
        """
        with self._locked():
            for offset in range(0, size, self.format.page_size):
                if not map_device(self.state, self.tables, ipa + offset, self.format.device | (pa + offset)):
                    unmap_range(self.state, self.tables, ipa, ipa + offset + PAGE_SIZE)
                    raise OutOfTablesError(f"no page-table page left to map a device at {ipa:#x}")

    def unmap(self, ipa: Ipa, size: int) -> None:
        """Make a range absent (the host takes pages away: kvm_unmap_hva_range). The caller flushes the TLBs."""
        with self._locked():
            unmap_range(self.state, self.tables, ipa, ipa + size)

    def protect(self, ipa: Ipa, size: int) -> None:
        """Write-protect a range, blocks whole. The caller flushes the TLBs."""
        protect_range(self.state, self.tables, ipa, ipa + size)

    def age(self, ipa: Ipa, size: int) -> int:
        """Clear the access flags of a range: number of leaves that were young."""
        return int(age_range(self.state, self.tables, ipa, ipa + size))

    def harvest(self, ipa: Ipa, bitmap: NDArray[np.uint64], out: NDArray[np.uint64]) -> int:
        """Swap the log into `out` and protect what was dirty: number of non-zero words. The caller flushes the TLBs."""
        return int(harvest(self.state, self.tables, ipa, bitmap.ctypes.data, out.view(np.int64)))

    def clear(self, ipa: Ipa, bitmap: NDArray[np.uint64], first_word: int, mask: NDArray[np.uint64]) -> int:
        """Clear and protect the pages of `mask`: number of words that changed. The caller flushes the TLBs."""
        return int(clear(self.state, self.tables, ipa, bitmap.ctypes.data, first_word, mask.view(np.int64)))

    def mark(self, bitmap: NDArray[np.uint64], first_page: int, num_pages: int) -> None:
        """Set bits of a dirty bitmap for a write by the host; vCPUs may be setting others at the same time."""
        mark_range(bitmap.ctypes.data, first_page, num_pages)

    def fault(self, ipa: Ipa, cpu: int = 0) -> FaultResult:
        """Resolve a stage-2 abort of a CPU at `ipa`, as its abort handler does."""
        return FaultResult(handle_fault(self.state, self.slots, self.tables, ipa, cpu))

    def entry(self, ipa: Ipa) -> tuple[int, int]:
        """The leaf descriptor and its level for `ipa`; descriptor 0 when nothing is mapped."""
        with self._locked():
            at, level = find_leaf(self.state, self.tables, ipa)
            value = int(self.tables[at]) if at >= 0 else 0
            present = at >= 0 and value & self.format.present
        return (value if present else 0), int(level)

    # -- accounts ------------------------------------------------------------------------------------------------------

    @property
    def free_tables(self) -> int:
        """Page-table pages that are not in use, also those that wait for a flush; the root is not counted."""
        return int(self.state[0]["pool_pages"] - self._root_pages - self.state[0]["tables"])

    def statistics(self) -> Mapping[str, int]:
        """The counters of `state.COUNTERS`, those of leaves by the leaves' size."""
        return {name: int(self.state[0][field]) for field, name in self._counters.items()}

    def validate(self) -> None:
        """Check the tables against the accounts; for tests. No CPU may be running.

        :raise AssertionError: When a counter disagrees with the tables, or the lists of pages not in use with both.
        """
        form = self.format
        found = dict.fromkeys(self._leaf_names, 0)
        tables = 0
        pool = int(self.state[0]["pool_pa"])
        pending = [(0, form.root_level)]
        while pending:
            first, level = pending.pop()
            for entry in self.tables[first : first + form.entries(level)]:
                value = int(entry)
                if not value & form.present:
                    continue
                if level < LAST_LEVEL and value & form.kind == form.table:
                    tables += 1
                    pending.append((((value & form.address) - pool) >> 3, level + 1))
                else:
                    found[level] += 1
        free = 0
        for name in ("pool_free", "pool_retired", "pool_flushing"):
            at = int(self.state[0][name])
            while at:
                free += 1
                at = int(self.tables[(at - 1) * self._page_words]) >> LINK_SHIFT
        statistics = self.statistics()
        for level, name in self._leaf_names.items():
            assert statistics[name] == found[level], (
                f"{name}: {statistics[name]} counted, {found[level]} mapped"
            )
        assert statistics["tables"] == tables, f"{statistics['tables']} tables counted, {tables} in use"
        assert free == self.free_tables, f"{free} pages on the lists, {self.free_tables} expected"

    def _index(self, number: int) -> int:
        for at in range(int(self.state[0]["slot_count"])):
            if self.slots[at]["number"] == number:
                return at
        raise KeyError(number)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """mmu_lock, which compiled code spins on."""
        address = int(self.state[0]["lock_address"])
        lock(address, int(self.state[0]["sched_yield"]))
        try:
            yield
        finally:
            unlock(address)
