"""Page-table pages: taken from a pool of physical memory that the CPU's table walker reads, accounted and given back.

A CPU may be in the middle of a walk through a table that has just been taken out. So a page that is given back keeps its entries
and is used again only when a flush that began afterwards has ended: then no CPU is in a walk from before (tlb.py).
"""

from sterna.jit.atomics import lock, unlock
from sterna.jit.kernel import kernel
from sterna.stage2.state import State, Words

# The first word of a page on a list links to the next: its page number and one, shifted so that a table walker that is still on
# its way through the page sees an invalid entry.
LINK_SHIFT = 1


@kernel(ahead=False, inline=True)
def first_word(s2: State, page: int) -> int:
    """Position of a page's first word."""
    return page << (s2[0].table_shift - 3)


@kernel(ahead=False)
def allocate(s2: State, tables: Words) -> int:
    """Physical address of a zeroed table page, or 0 when the pool is used up. The caller holds mmu_lock."""
    free = s2[0].pool_free
    if free == 0:
        return 0
    first = first_word(s2, free - 1)
    s2[0].pool_free = tables[first] >> LINK_SHIFT
    tables[first : first_word(s2, free)] = 0
    s2[0].tables += 1
    return s2[0].pool_pa + 8 * first


@kernel(ahead=False)
def release(s2: State, tables: Words, pa: int) -> None:
    """Give the table page at physical address `pa` back. The caller holds mmu_lock, and no entry points there."""
    page = (pa - s2[0].pool_pa) >> s2[0].table_shift
    tables[first_word(s2, page)] = s2[0].pool_retired << LINK_SHIFT
    if s2[0].pool_retired == 0:
        s2[0].pool_retired_last = page + 1
    s2[0].pool_retired = page + 1
    s2[0].tables -= 1


@kernel()
def begin_flush(s2: State, tables: Words) -> bool:
    """A flush is about to begin, one at a time: whether pages were released that can be used again when it has ended."""
    lock(s2[0].lock_address, s2[0].sched_yield)
    if s2[0].pool_retired != 0:
        if s2[0].pool_flushing == 0:
            s2[0].pool_flushing_last = s2[0].pool_retired_last
        else:  # a flush before this one failed
            tables[first_word(s2, s2[0].pool_retired_last - 1)] = s2[0].pool_flushing << LINK_SHIFT
        s2[0].pool_flushing = s2[0].pool_retired
        s2[0].pool_retired = 0
    unlock(s2[0].lock_address)
    return bool(s2[0].pool_flushing != 0)


@kernel()
def end_flush(s2: State, tables: Words) -> None:
    """The flush that such pages wait for has ended: no CPU is in a walk from before `begin_flush`."""
    lock(s2[0].lock_address, s2[0].sched_yield)
    tables[first_word(s2, s2[0].pool_flushing_last - 1)] = s2[0].pool_free << LINK_SHIFT
    s2[0].pool_free = s2[0].pool_flushing
    s2[0].pool_flushing = 0
    unlock(s2[0].lock_address)
