"""Changes to the shape of the tables: install, dissolve, collapse, unmap. All callers hold mmu_lock.

An entry that is replaced by one of another size goes through break-before-make (ARM DDI 0406C, B3.10.1): invalid, TLB
maintenance, new entry. The invalidation here is posted to the CPUs and not awaited: what a TLB may still hold maps the same
memory with the same or fewer permissions than the new entry, so nothing can be lost through it. Changes that take
something away (`unmap_range`, write protection) are followed by a flush that is awaited (tlb.py).
"""

from numba import njit

from sterna.stage2.atomics import atomic_xchg
from sterna.stage2.pool import allocate, release
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


@njit(nogil=True, cache=True)
def post_tlbi(s2):  # type: ignore[no-untyped-def]
    """Let every CPU flush its TLB before it enters the guest again."""
    for cpu in range(s2[0].cpus):
        atomic_xchg(s2[0].tlbi_address + 8 * cpu, 1)
    s2[0].tlbi_posted += 1


@njit(nogil=True, cache=True)
def leaf_entry(s2, level, pa, writable):  # type: ignore[no-untyped-def]
    """The descriptor that maps `pa` at a level."""
    entry = (s2[0].page if level == 3 else s2[0].block) | pa
    if writable:
        entry |= s2[0].write
    return entry


@njit(nogil=True, cache=True)
def table_at(s2, tables, at):  # type: ignore[no-untyped-def]
    """The table that the entry at `at` points to, made when the entry is absent: its first position, or -1 without memory."""
    entry = tables[at]
    if not is_present(s2, entry):
        pa = allocate(s2, tables)
        if pa == 0:
            return -1
        tables[at] = pa | s2[0].table
        return position(s2, pa)
    return position(s2, entry & s2[0].address)


@njit(nogil=True, cache=True)
def free_tree(s2, tables, entry, level):  # type: ignore[no-untyped-def]
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


@njit(nogil=True, cache=True)
def dissolve(s2, tables, at, level):  # type: ignore[no-untyped-def]
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
    tables[at] = pa | s2[0].table
    # Another CPU may have come by while the entry was invalid; its fault is not to be taken for a write.
    s2[0].populations += 1
    count_leaf(s2, level, -1)
    count_leaf(s2, level + 1, 512)
    s2[0].blocks_dissolved += 1
    return first


@njit(nogil=True, cache=True)
def collapse(s2, tables, at, level, entry):  # type: ignore[no-untyped-def]
    """Replace the table that the entry at `at` points to by the block `entry`, and free it."""
    old = tables[at]
    tables[at] = 0
    post_tlbi(s2)
    tables[at] = entry
    free_tree(s2, tables, old, level)
    count_leaf(s2, level, 1)
    s2[0].blocks_rebuilt += 1


@njit(nogil=True, cache=True)
def map_device(s2, tables, ipa, entry):  # type: ignore[no-untyped-def]
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


@njit(nogil=True, cache=True)
def table_is_empty(s2, tables, first):  # type: ignore[no-untyped-def]
    """Whether no entry of a table is present."""
    for i in range(first, first + 512):  # noqa: SIM110 - numba compiles no generators' all()
        if is_present(s2, tables[i]):
            return False
    return True


@njit(nogil=True, cache=True)
def _unmap_pages(s2, tables, first, start, end):  # type: ignore[no-untyped-def]
    """Clear the entries of the last-level table at `first` for [start, end) within its 2 MiB."""
    base = start & ~(level_size(2) - 1)
    for i in range((start - base) >> 12, (end - base) >> 12):
        if is_present(s2, tables[first + i]):
            tables[first + i] = 0
            count_leaf(s2, 3, -1)


@njit(nogil=True, cache=True)
def unmap_range(s2, tables, start, end):  # type: ignore[no-untyped-def]
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
