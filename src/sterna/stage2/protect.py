"""Write protection of ranges, and the generic get- and clear-dirty-log built on it.

Each function takes mmu_lock; none flushes: that is the caller's, before it returns to whoever asked (tlb.py).
"""

from sterna.jit.atomics import (
    atomic_and,
    atomic_load,
    atomic_or,
    atomic_xchg,
    highest_bit,
    lock,
    lowest_bit,
    unlock,
)
from sterna.jit.kernel import kernel
from sterna.stage2.format import LAST_LEVEL
from sterna.stage2.state import State, Words
from sterna.stage2.walk import find_leaf, is_present, is_table, level_shift

_WORDS_PER_LOCK = 1024
"""A harvest gives mmu_lock up after this many words (256 MiB in pages of 4 KiB), so that faulting vCPUs get on."""
_WORD_SHIFT = 6
"""A word's pages, as a power of two."""


@kernel(ahead=False)
def protect_locked(s2: State, tables: Words, start: int, end: int) -> None:
    """Make every leaf that maps a part of [start, end) read-only; blocks are protected whole. The caller holds mmu_lock."""
    page_shift = level_shift(s2, LAST_LEVEL)
    table_shift = level_shift(s2, LAST_LEVEL - 1)
    ipa = start
    while ipa < end:
        at, level = find_leaf(s2, tables, ipa)
        if level == LAST_LEVEL:
            stop = min(((ipa >> table_shift) + 1) << table_shift, end)
            write = s2[0].write
            count = 0
            table = tables[at : at + ((stop - ipa + (1 << page_shift) - 1) >> page_shift)]
            for i in range(table.size):
                entry = table[i]
                if (entry & write) != 0:
                    table[i] = entry & ~write
                    count += 1
            s2[0].pages_protected += count
            ipa = stop
            continue
        shift = level_shift(s2, level)
        above = level_shift(s2, level - 1)
        stop = min(((ipa >> above) + 1) << above, end)
        while True:
            entry = tables[at]
            if is_present(s2, entry) and (entry & s2[0].write) != 0:
                tables[at] = entry & ~s2[0].write
                s2[0].blocks_protected += 1
            ipa = ((ipa >> shift) + 1) << shift
            at += 1
            if ipa >= stop or is_table(s2, tables[at]):
                break


@kernel()
def protect_range(s2: State, tables: Words, start: int, end: int) -> None:
    """Write-protect [start, end), giving the lock up between level-1 entries as the kernel's walk does."""
    shift = level_shift(s2, max(1, s2[0].root_level))
    ipa = start
    while ipa < end:
        stop = min(((ipa >> shift) + 1) << shift, end)
        lock(s2[0].lock_address, s2[0].sched_yield)
        protect_locked(s2, tables, ipa, stop)
        unlock(s2[0].lock_address)
        ipa = stop


@kernel(ahead=False)
def _protect_mask(s2: State, tables: Words, base: int, mask: int) -> None:
    """Protect from the first to the last set bit, as kvm_arch_mmu_enable_log_dirty_pt_masked does for ARM."""
    shift = level_shift(s2, LAST_LEVEL)
    protect_locked(s2, tables, base + (lowest_bit(mask) << shift), base + ((highest_bit(mask) + 1) << shift))


@kernel()
def harvest(s2: State, tables: Words, ipa: int, bitmap: int, out: Words) -> int:
    """Swap each word of the bitmap at address `bitmap` for zero, protect what was dirty: number of words that were not zero.

    Linux ba0513b5b8ff, kvm_get_dirty_log_protect: `out` gets the words, `shape (words,)`, dtype int64.
    """
    word_shift = level_shift(s2, LAST_LEVEL) + _WORD_SHIFT
    found = 0
    for first in range(0, out.size, _WORDS_PER_LOCK):
        lock(s2[0].lock_address, s2[0].sched_yield)
        for w in range(first, min(first + _WORDS_PER_LOCK, out.size)):
            # Most words are zero most of the time, and are seen to be at a tenth of the price of an exchange.
            mask = atomic_load(bitmap + 8 * w)
            if mask != 0:
                mask = atomic_xchg(bitmap + 8 * w, 0)
            out[w] = mask
            if mask != 0:
                found += 1
                _protect_mask(s2, tables, ipa + (w << word_shift), mask)
        unlock(s2[0].lock_address)
    return found


@kernel()
def clear(s2: State, tables: Words, ipa: int, bitmap: int, first_word: int, mask_words: Words) -> int:
    """Clear the bits of `mask_words` in the bitmap, protect those that were set: number of words that changed.

    Only bits that are really cleared are protected (Linux 2a31b9db1535, kvm_clear_dirty_log_protect).
    """
    word_shift = level_shift(s2, LAST_LEVEL) + _WORD_SHIFT
    changed = 0
    for first in range(0, mask_words.size, _WORDS_PER_LOCK):
        lock(s2[0].lock_address, s2[0].sched_yield)
        for w in range(first, min(first + _WORDS_PER_LOCK, mask_words.size)):
            if mask_words[w] == 0:
                continue
            at = first_word + w
            mask = atomic_and(bitmap + 8 * at, ~mask_words[w]) & mask_words[w]
            if mask != 0:
                changed += 1
                _protect_mask(s2, tables, ipa + (at << word_shift), mask)
        unlock(s2[0].lock_address)
    return changed


@kernel()
def age_range(s2: State, tables: Words, start: int, end: int) -> int:
    """Clear the access flag of every leaf that maps a part of [start, end): number of leaves that had it set.

    The host's page aging (kvm_age_hva). A TLB may hold an entry a while longer; the kernel does not flush here either.
    """
    young = 0
    lock(s2[0].lock_address, s2[0].sched_yield)
    ipa = start
    while ipa < end:
        at, level = find_leaf(s2, tables, ipa)
        entry = tables[at]
        if is_present(s2, entry) and (entry & s2[0].access) != 0:
            tables[at] = entry & ~s2[0].access
            young += 1
        shift = level_shift(s2, level)
        ipa = ((ipa >> shift) + 1) << shift
    unlock(s2[0].lock_address)
    return young


@kernel()
def mark_range(bitmap: int, first_page: int, num_pages: int) -> None:
    """Set the bits of a range of pages in the bitmap at address `bitmap`. Needs no lock: a set bit is never wrong."""
    page = first_page
    end = first_page + num_pages
    while page < end:
        bit = page & 63
        count = min(64 - bit, end - page)
        mask = -1 if count == 64 else ((1 << count) - 1) << bit
        atomic_or(bitmap + ((page >> 6) << 3), mask)
        page += count
