"""Page-table pages: taken from a pool of physical memory that the CPU's table walker reads, accounted and given back."""

from numba import njit

_PAGE_WORDS = 512


@njit(nogil=True, cache=True)
def allocate(s2, tables):  # type: ignore[no-untyped-def]
    """Physical address of a zeroed table page, or 0 when the pool is used up. The caller holds mmu_lock."""
    free = s2[0].pool_free
    if free == 0:
        return 0
    first = (free - 1) * _PAGE_WORDS
    s2[0].pool_free = tables[first]
    tables[first : first + _PAGE_WORDS] = 0
    s2[0].tables += 1
    return s2[0].pool_pa + (free - 1) * 4096


@njit(nogil=True, cache=True)
def release(s2, tables, pa):  # type: ignore[no-untyped-def]
    """Give the table page at physical address `pa` back. The caller holds mmu_lock, and no entry points there."""
    page = (pa - s2[0].pool_pa) >> 12
    tables[page * _PAGE_WORDS] = s2[0].pool_free
    s2[0].pool_free = page + 1
    s2[0].tables -= 1
