"""Changes to the shape of the tables: install, dissolve, collapse, unmap. All callers hold mmu_lock.

An entry that is replaced by one of another size goes through break-before-make (ARM DDI 0406C, B3.10.1): invalid, TLB
maintenance, new entry. The invalidation here is posted to the CPUs and not awaited: what a TLB may still hold maps the same
memory with the same or fewer permissions than the new entry, so nothing can be lost through it. What a walk may still find in
a table that was taken out does too, until its page is used again after a flush (pool.py). Changes that take
something away (`unmap_range`, write protection) are followed by a flush that is awaited (tlb.py).

A table's entries are complete before the entry that points to it, as a CPU's walker sees them (`store_release`).
"""

from sterna.jit.atomics import atomic_xchg, store_release
from sterna.jit.kernel import kernel
from sterna.stage2.pool import allocate, release
from sterna.stage2.state import State, Words
from sterna.stage2.walk import (
    PMD_SHIFT,
    PUD_SHIFT,
    count_leaf,
    find_leaf,
    is_present,
    is_table,
    level_size,
    position,
)


@kernel(ahead=False)
def post_tlbi(s2: State) -> None:
    """Let every CPU flush its TLB before it enters the guest again."""
    for cpu in range(s2[0].cpus):
        atomic_xchg(s2[0].tlbi_address + 8 * cpu, 1)
    s2[0].tlbi_posted += 1


@kernel(ahead=False)
def leaf_entry(s2: State, level: int, pa: int, writable: bool) -> int:
    """The descriptor that maps `pa` at a level."""
    entry = (s2[0].page if level == 3 else s2[0].block) | pa
    if writable:
        entry |= s2[0].write
    return entry


@kernel(ahead=False)
def table_at(s2: State, tables: Words, at: int) -> int:
    """The table that the entry at `at` points to, made when the entry is absent: its first position, or -1 without memory."""
    entry = tables[at]
    if not is_present(s2, entry):
        pa = allocate(s2, tables)
        if pa == 0:
            return -1
        store_release(tables, at, pa | s2[0].table)
        return position(s2, pa)
    return position(s2, entry & s2[0].address)


@kernel(ahead=False)
def free_tree(s2: State, tables: Words, entry: int, level: int) -> None:
    """Free the table that `entry` of a level points to, and all below; the entry itself is already gone from the tables."""
    first = position(s2, entry & s2[0].address)
    for i in range(first, first + 512):
        child = tables[i]
        if not is_present(s2, child):
            continue
        if level == 1 and is_table(s2, child):
            below = position(s2, child & s2[0].address)
            for j in range(below, below + 512):
                if is_present(s2, tables[j]):
                    count_leaf(s2, 3, -1)
            release(s2, tables, child & s2[0].address)
        else:
            count_leaf(s2, level + 1, -1)
    release(s2, tables, entry & s2[0].address)


@kernel(ahead=False)
def dissolve(s2: State, tables: Words, at: int, level: int) -> int:
    """Replace the read-only block at `at` by a full table of read-only leaves one level down: first position, or -1.

    The child table is complete before the block is broken, so no CPU finds a page missing that was mapped.
    """
    block = tables[at]
    pa = allocate(s2, tables)
    if pa == 0:
        return -1
    first = position(s2, pa)
    size = level_size(level + 1)
    base = block & s2[0].address
    template = leaf_entry(s2, level + 1, 0, False)
    if (block & s2[0].access) == 0:
        template &= ~s2[0].access
    if (block & s2[0].write) != 0:
        template |= s2[0].write
    for i in range(512):
        tables[first + i] = template | (base + i * size)
    tables[at] = 0
    post_tlbi(s2)
    store_release(tables, at, pa | s2[0].table)
    # Another CPU may have come by while the entry was invalid; its fault is not to be taken for a write.
    s2[0].populations += 1
    count_leaf(s2, level, -1)
    count_leaf(s2, level + 1, 512)
    s2[0].blocks_dissolved += 1
    return first


@kernel(ahead=False)
def collapse(s2: State, tables: Words, at: int, level: int, entry: int) -> None:
    """Replace the table that the entry at `at` points to by the block `entry`, and free it."""
    old = tables[at]
    tables[at] = 0
    post_tlbi(s2)
    tables[at] = entry
    free_tree(s2, tables, old, level)
    count_leaf(s2, level, 1)
    s2[0].blocks_rebuilt += 1


@kernel()
def map_device(s2: State, tables: Words, ipa: int, entry: int) -> bool:
    """Install the page entry of a device: whether there was memory for the tables. The range holds no slot."""
    at = table_at(s2, tables, position(s2, s2[0].root_pa) + (ipa >> PUD_SHIFT))
    if at < 0:
        return False
    at = table_at(s2, tables, at + ((ipa >> PMD_SHIFT) & 511))
    if at < 0:
        return False
    at += (ipa >> 12) & 511
    if not is_present(s2, tables[at]):
        count_leaf(s2, 3, 1)
    tables[at] = entry
    return True


@kernel(ahead=False)
def table_is_empty(s2: State, tables: Words, first: int) -> bool:
    """Whether no entry of a table is present."""
    for i in range(first, first + 512):  # noqa: SIM110 - numba compiles no generators' all()
        if is_present(s2, tables[i]):
            return False
    return True


@kernel(ahead=False)
def _unmap_pages(s2: State, tables: Words, first: int, start: int, end: int) -> None:
    """Clear the entries of the last-level table at `first` for [start, end) within its 2 MiB."""
    base = start & ~(level_size(2) - 1)
    for i in range((start - base) >> 12, (end - base) >> 12):
        if is_present(s2, tables[first + i]):
            tables[first + i] = 0
            count_leaf(s2, 3, -1)


@kernel()
def unmap_range(s2: State, tables: Words, start: int, end: int) -> None:
    """Make [start, end) absent, and free the tables that become empty.

    A block that the range touches goes whole: what else it mapped faults in again. The flush is the caller's.
    """
    ipa = start
    while ipa < end:
        root_at = position(s2, s2[0].root_pa) + (ipa >> PUD_SHIFT)
        root_end = min(((ipa >> PUD_SHIFT) + 1) << PUD_SHIFT, end)
        at, level = find_leaf(s2, tables, ipa)
        if level == 1:
            if is_present(s2, tables[at]):
                tables[at] = 0
                count_leaf(s2, 1, -1)
            ipa = root_end
            continue
        pmd_end = min(((ipa >> PMD_SHIFT) + 1) << PMD_SHIFT, end)
        if level == 2:
            if is_present(s2, tables[at]):
                tables[at] = 0
                count_leaf(s2, 2, -1)
        else:
            first = at - ((ipa >> 12) & 511)
            _unmap_pages(s2, tables, first, ipa, pmd_end)
            if table_is_empty(s2, tables, first):
                pmd_at = position(s2, tables[root_at] & s2[0].address) + ((ipa >> PMD_SHIFT) & 511)
                table = tables[pmd_at]
                tables[pmd_at] = 0
                release(s2, tables, table & s2[0].address)
        ipa = pmd_end
        if ipa >= root_end:
            first = position(s2, tables[root_at] & s2[0].address)
            if table_is_empty(s2, tables, first):
                table = tables[root_at]
                tables[root_at] = 0
                release(s2, tables, table & s2[0].address)
