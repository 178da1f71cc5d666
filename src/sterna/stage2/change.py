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
from sterna.stage2.format import LAST_LEVEL
from sterna.stage2.pool import allocate, release
from sterna.stage2.state import State, Words
from sterna.stage2.walk import (
    count_leaf,
    entry_at,
    find_leaf,
    index_in,
    is_present,
    is_table,
    level_shift,
    level_size,
    position,
    table_entries,
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
    entry = (s2[0].page if level == LAST_LEVEL else s2[0].block) | pa
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
def _free_table(s2: State, tables: Words, entry: int, level: int) -> None:
    """Free the table of a level that `entry` points to, but for the tables below it."""
    first = position(s2, entry & s2[0].address)
    table = tables[first : first + table_entries(s2, level)]
    last = level == LAST_LEVEL
    leaves = 0
    for i in range(table.size):
        if is_present(s2, table[i]) and (last or not is_table(s2, table[i])):
            leaves += 1
    count_leaf(s2, level, -leaves)
    release(s2, tables, entry & s2[0].address)


@kernel(ahead=False)
def free_tree(s2: State, tables: Words, entry: int, level: int) -> None:
    """Free the table that `entry` of level 1 or 2, where blocks are, points to, and all below; the entry itself is already gone
    from the tables.
    """
    if level == 1:
        first = position(s2, entry & s2[0].address)
        for i in range(first, first + table_entries(s2, 2)):
            if is_table(s2, tables[i]):
                _free_table(s2, tables, tables[i], LAST_LEVEL)
    _free_table(s2, tables, entry, level + 1)


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
    shift = level_shift(s2, level + 1)
    entries = table_entries(s2, level + 1)
    base = block & s2[0].address
    template = leaf_entry(s2, level + 1, 0, False)
    if (block & s2[0].access) == 0:
        template &= ~s2[0].access
    if (block & s2[0].write) != 0:
        template |= s2[0].write
    table = tables[first : first + entries]
    for i in range(entries):
        table[i] = template | (base + (i << shift))
    tables[at] = 0
    post_tlbi(s2)
    store_release(tables, at, pa | s2[0].table)
    # Another CPU may have come by while the entry was invalid; its fault is not to be taken for a write.
    s2[0].populations += 1
    count_leaf(s2, level, -1)
    count_leaf(s2, level + 1, entries)
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
    at = position(s2, s2[0].root_pa) + index_in(s2, ipa, s2[0].root_level)
    for level in range(s2[0].root_level + 1, LAST_LEVEL + 1):
        first = table_at(s2, tables, at)
        if first < 0:
            return False
        at = first + index_in(s2, ipa, level)
    if not is_present(s2, tables[at]):
        count_leaf(s2, LAST_LEVEL, 1)
    tables[at] = entry
    return True


@kernel(ahead=False)
def table_is_empty(s2: State, tables: Words, first: int, entries: int) -> bool:
    """Whether none of a table's entries is present."""
    for i in range(first, first + entries):  # noqa: SIM110 - numba compiles no generators' all()
        if is_present(s2, tables[i]):
            return False
    return True


@kernel(ahead=False)
def _unmap_leaves(s2: State, tables: Words, at: int, count: int, level: int) -> None:
    """Clear `count` entries of a table of a level, none of which points to a table, from position `at` on."""
    for i in range(at, at + count):
        if is_present(s2, tables[i]):
            tables[i] = 0
            count_leaf(s2, level, -1)


@kernel(ahead=False)
def _free_empty(s2: State, tables: Words, ipa: int, level: int) -> bool:
    """Free the table of a level, not the root's, that the walk for `ipa` goes through, if it is empty: whether it was."""
    first = entry_at(s2, tables, ipa, level) - index_in(s2, ipa, level)
    if not table_is_empty(s2, tables, first, table_entries(s2, level)):
        return False
    above = entry_at(s2, tables, ipa, level - 1)
    table = tables[above]
    tables[above] = 0
    release(s2, tables, table & s2[0].address)
    return True


@kernel()
def unmap_range(s2: State, tables: Words, start: int, end: int) -> None:
    """Make [start, end) absent, and free the tables that become empty.

    A block that the range touches goes whole: what else it mapped faults in again. The flush is the caller's.
    """
    ipa = start
    while ipa < end:
        here = ipa
        at, level = find_leaf(s2, tables, here)
        shift = level_shift(s2, level)
        # The rest of a table of pages at once, else one entry.
        span = level_shift(s2, LAST_LEVEL - 1) if level == LAST_LEVEL else shift
        ipa = min(((here >> span) + 1) << span, end)
        _unmap_leaves(s2, tables, at, ((ipa - 1) >> shift) - (here >> shift) + 1, level)
        # Each table once, when nothing more is to be taken out of it.
        while level > s2[0].root_level and (ipa == end or (ipa & (level_size(s2, level - 1) - 1)) == 0):
            if not _free_empty(s2, tables, here, level):
                break
            level -= 1
