"""The stage-2 fault: what the hypervisor does when the table walk ends in an abort.

The kind of the access is told by the tables: a leaf that is present and accessed, and still faulted, was written to without
permission. An absent leaf does not tell, so with logging on it is mapped read-only and a write comes back as a permission fault.
A leaf that another CPU has populated since this one's last fault does not tell either: the access is made again.
"""

from enum import IntEnum

from sterna.jit.atomics import atomic_load, atomic_or, atomic_xchg, lock, unlock
from sterna.jit.kernel import kernel
from sterna.stage2.change import collapse, dissolve, leaf_entry, table_at
from sterna.stage2.format import LAST_LEVEL
from sterna.stage2.state import Slots, State, Words
from sterna.stage2.walk import (
    count_leaf,
    entry_at,
    find_leaf,
    find_slot,
    index_in,
    is_present,
    is_table,
    level_shift,
    level_size,
    position,
)


class FaultResult(IntEnum):
    """What became of a fault."""

    RESUME = 0
    """The access can be made again."""
    NO_SLOT = 1
    """No memory slot holds the address."""
    READONLY = 2
    """A write to a read-only slot."""
    NO_MEMORY = 3
    """The table pool is used up."""


RESUME, NO_SLOT, READONLY, NO_MEMORY = 0, 1, 2, 3


@kernel(ahead=False)
def fits_leaf(s2: State, slots: Slots, slot: int, ipa: int, level: int) -> bool:
    """Whether a leaf of `level` around `ipa` lies in the slot, and its physical address has the alignment."""
    size = level_size(s2, level)
    base = ipa & ~(size - 1)
    return (
        size <= s2[0].max_leaf
        and base >= slots[slot].ipa
        and base + size <= slots[slot].ipa + slots[slot].size
        and ((slots[slot].ipa - slots[slot].pa) & (size - 1)) == 0
    )


@kernel(ahead=False)
def mark_dirty(s2: State, bitmap: int, page: int) -> None:
    """Set a page's bit in the dirty bitmap at address `bitmap`."""
    atomic_or(bitmap + ((page >> 6) << 3), 1 << (page & 63))
    s2[0].dirty_marked += 1


@kernel(ahead=False)
def _populate(
    s2: State, slots: Slots, tables: Words, slot: int, ipa: int, writable: bool, may_block: bool
) -> int:
    """Map `ipa` where the walk found nothing."""
    address = ipa - slots[slot].ipa + slots[slot].pa
    page_shift = level_shift(s2, LAST_LEVEL)
    at = position(s2, s2[0].root_pa) + index_in(s2, ipa, s2[0].root_level)
    for level in range(s2[0].root_level, LAST_LEVEL):
        size = level_size(s2, level)
        if may_block and fits_leaf(s2, slots, slot, ipa, level):
            entry = leaf_entry(s2, level, address & ~(size - 1), writable)
            if is_table(s2, tables[at]):
                collapse(s2, tables, at, level, entry)
            else:
                tables[at] = entry
                count_leaf(s2, level, 1)
            return RESUME
        fresh = not is_present(s2, tables[at])
        first = table_at(s2, tables, at)
        if first < 0:
            return NO_MEMORY
        if level == LAST_LEVEL - 1 and fresh and not may_block:
            # One fault for the whole table: each page is read-only, so each first write is still seen.
            base = ipa & ~(size - 1)
            start = max(base, slots[slot].ipa)
            end = min(base + size, slots[slot].ipa + slots[slot].size)
            pages = (end - start) >> page_shift
            template = leaf_entry(s2, LAST_LEVEL, 0, writable)
            pa = start - slots[slot].ipa + slots[slot].pa
            first += (start - base) >> page_shift
            table = tables[first : first + pages]
            for i in range(pages):
                table[i] = template | (pa + (i << page_shift))
            count_leaf(s2, LAST_LEVEL, pages)
            return RESUME
        at = first + index_in(s2, ipa, level + 1)
    tables[at] = leaf_entry(s2, LAST_LEVEL, (address >> page_shift) << page_shift, writable)
    count_leaf(s2, LAST_LEVEL, 1)
    return RESUME


@kernel(ahead=False)
def _write_logged(s2: State, slots: Slots, tables: Words, slot: int, ipa: int, at: int, level: int) -> int:
    """A write to a protected page of a logged slot: dissolve down to pages, mark, let through."""
    while level < LAST_LEVEL:
        first = dissolve(s2, tables, at, level)
        if first < 0:
            return NO_MEMORY
        level += 1
        at = first + index_in(s2, ipa, level)
    # The bit before the permission: a harvest between the two would clear a bit for a write still to come otherwise.
    mark_dirty(s2, slots[slot].bitmap, (ipa - slots[slot].ipa) >> level_shift(s2, LAST_LEVEL))
    tables[at] |= s2[0].write
    return RESUME


@kernel(ahead=False)
def _write_unlogged(s2: State, slots: Slots, tables: Words, slot: int, ipa: int, at: int, level: int) -> int:
    """A write to a page still protected after logging stopped: rebuild its block where one fits, else let through."""
    for wanted in range(s2[0].root_level, level):
        if fits_leaf(s2, slots, slot, ipa, wanted):
            parent = entry_at(s2, tables, ipa, wanted)
            address = (ipa - slots[slot].ipa + slots[slot].pa) & ~(level_size(s2, wanted) - 1)
            collapse(s2, tables, parent, wanted, leaf_entry(s2, wanted, address, True))
            return RESUME
    tables[at] |= s2[0].write
    return RESUME


@kernel(ahead=False)
def _resolve(s2: State, slots: Slots, tables: Words, ipa: int, seen: int) -> int:
    slot = find_slot(s2, slots, ipa)
    if slot < 0:
        return NO_SLOT
    readonly = slots[slot].readonly != 0
    logging = slots[slot].bitmap != 0 and not readonly
    at, level = find_leaf(s2, tables, ipa)
    if at < 0:
        return NO_SLOT
    entry = tables[at]
    if not is_present(s2, entry):
        s2[0].faults_translation += 1
        s2[0].populations += 1
        return _populate(s2, slots, tables, slot, ipa, not (logging or readonly), not logging)
    if (entry & s2[0].access) != s2[0].access:
        s2[0].faults_access_flag += 1
        s2[0].populations += 1
        tables[at] = entry | s2[0].access
        return RESUME
    if (entry & s2[0].write) != 0 or s2[0].populations != seen:
        # Another CPU was first, or this one's TLB held the entry from before.
        s2[0].faults_spurious += 1
        return RESUME
    if readonly:
        return READONLY
    s2[0].faults_permission += 1
    if logging:
        return _write_logged(s2, slots, tables, slot, ipa, at, level)
    return _write_unlogged(s2, slots, tables, slot, ipa, at, level)


@kernel()
def handle_fault(s2: State, slots: Slots, tables: Words, ipa: int, cpu: int) -> int:
    """Resolve a stage-2 abort of a CPU at `ipa`: a `FaultResult`. Takes mmu_lock; runs on that vCPU's thread."""
    seen = s2[0].seen_address + 8 * cpu
    lock(s2[0].lock_address, s2[0].sched_yield)
    outcome = _resolve(s2, slots, tables, ipa, atomic_load(seen))
    atomic_xchg(seen, s2[0].populations)
    if outcome != RESUME:
        s2[0].faults_unhandled += 1
    unlock(s2[0].lock_address)
    return int(outcome)
