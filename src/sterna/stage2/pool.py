"""Page-table pages: taken from a pool of physical memory that the CPU's table walker reads, accounted and given back."""

from sterna.memory.kernel import kernel
from sterna.stage2.state import State, Words

_PAGE_WORDS = 512
# A free page's first word links to the next: its page number and one, shifted so that a table walker that is still on its way
# through the page sees an invalid entry.
LINK_SHIFT = 1


@kernel(ahead=False)
def allocate(s2: State, tables: Words) -> int:
    """Physical address of a zeroed table page, or 0 when the pool is used up. The caller holds mmu_lock."""
    free = s2[0].pool_free
    if free == 0:
        return 0
    first = (free - 1) * _PAGE_WORDS
    s2[0].pool_free = tables[first] >> LINK_SHIFT
    tables[first : first + _PAGE_WORDS] = 0
    s2[0].tables += 1
    return s2[0].pool_pa + (free - 1) * 4096


@kernel(ahead=False)
def release(s2: State, tables: Words, pa: int) -> None:
    """Give the table page at physical address `pa` back. The caller holds mmu_lock, and no entry points there."""
    page = (pa - s2[0].pool_pa) >> 12
    tables[page * _PAGE_WORDS] = s2[0].pool_free << LINK_SHIFT
    s2[0].pool_free = page + 1
    s2[0].tables -= 1
