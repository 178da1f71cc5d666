"""Walks by IPA: from the root to a leaf, without reverse mappings.

Entries are addressed by their position, an index into the pool's words. All callers hold mmu_lock.
"""

from sterna.jit.kernel import kernel
from sterna.stage2.state import Slots, State, Words

PAGE_SHIFT = 12
PMD_SHIFT = 21
PUD_SHIFT = 30


@kernel(ahead=False, inline=True)
def position(s2: State, table_pa: int) -> int:
    """Index of the first entry of the table at physical address `table_pa`."""
    return (table_pa - s2[0].pool_pa) >> 3


@kernel(ahead=False, inline=True)
def is_table(s2: State, entry: int) -> bool:
    """Whether an entry of level 1 or 2 points to a next-level table."""
    return (entry & s2[0].present) != 0 and (entry & s2[0].kind) == s2[0].table


@kernel(ahead=False, inline=True)
def is_present(s2: State, entry: int) -> bool:
    """Whether an entry is valid."""
    return (entry & s2[0].present) != 0


@kernel(ahead=False)
def find_slot(s2: State, slots: Slots, ipa: int) -> int:
    """Index of the memory slot that holds `ipa`, or -1."""
    for i in range(s2[0].slot_count):
        offset = ipa - slots[i].ipa
        if 0 <= offset < slots[i].size:
            return i
    return -1


@kernel()
def find_leaf(s2: State, tables: Words, ipa: int) -> tuple[int, int]:
    """The entry that ends the walk for `ipa`: (position, level). The entry may be absent. Position -1: outside the IPA space."""
    index = ipa >> PUD_SHIFT
    if index < 0 or index >= s2[0].root_entries:
        return -1, 1
    at = position(s2, s2[0].root_pa) + index
    entry = tables[at]
    if not is_table(s2, entry):
        return at, 1
    at = position(s2, entry & s2[0].address) + ((ipa >> PMD_SHIFT) & 511)
    entry = tables[at]
    if not is_table(s2, entry):
        return at, 2
    return position(s2, entry & s2[0].address) + ((ipa >> PAGE_SHIFT) & 511), 3


@kernel(ahead=False, inline=True)
def level_size(level: int) -> int:
    """Bytes that one leaf of a level maps."""
    return 1 << (PAGE_SHIFT + 9 * (3 - level))


@kernel(ahead=False)
def count_leaf(s2: State, level: int, change: int) -> None:
    """Keep the statistics of what is mapped."""
    if level == 3:
        s2[0].pages_4k += change
    elif level == 2:
        s2[0].blocks_2m += change
    else:
        s2[0].blocks_1g += change
