"""Walks by IPA: from the root to a leaf, without reverse mappings.

Entries are addressed by their position, an index into the pool's words. All callers hold mmu_lock.
"""

from sterna.jit.kernel import kernel
from sterna.stage2.format import LAST_LEVEL
from sterna.stage2.state import Slots, State, Words


@kernel(ahead=False, inline=True)
def position(s2: State, table_pa: int) -> int:
    """Index of the first entry of the table at physical address `table_pa`."""
    return (table_pa - s2[0].pool_pa) >> 3


@kernel(ahead=False, inline=True)
def is_table(s2: State, entry: int) -> bool:
    """Whether an entry of a level above the last points to a next-level table; one that is absent does not."""
    return (entry & s2[0].kind) == s2[0].table


@kernel(ahead=False, inline=True)
def is_present(s2: State, entry: int) -> bool:
    """Whether an entry is valid."""
    return (entry & s2[0].present) != 0


@kernel(ahead=False, inline=True)
def level_shift(s2: State, level: int) -> int:
    """The bytes that an entry of a level maps, as a power of two."""
    return (s2[0].shifts >> (8 * (LAST_LEVEL - level))) & 0xFF


@kernel(ahead=False, inline=True)
def level_size(s2: State, level: int) -> int:
    """Bytes that one entry of a level maps."""
    return 1 << level_shift(s2, level)


@kernel(ahead=False, inline=True)
def index_in(s2: State, ipa: int, level: int) -> int:
    """Which entry of its table at a level is that of `ipa`."""
    return (ipa & (level_size(s2, level - 1) - 1)) >> level_shift(s2, level)


@kernel(ahead=False, inline=True)
def table_entries(s2: State, level: int) -> int:
    """Number of entries in a table of a level below the root's."""
    return 1 << (level_shift(s2, level - 1) - level_shift(s2, level))


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
    level = s2[0].root_level
    shift = level_shift(s2, level)
    index = ipa >> shift
    if index < 0 or index >= s2[0].root_entries:
        return -1, level
    at = position(s2, s2[0].root_pa) + index
    while level < LAST_LEVEL:
        entry = tables[at]
        if not is_table(s2, entry):
            break
        level += 1
        within = ipa & ((1 << shift) - 1)
        shift = level_shift(s2, level)
        at = position(s2, entry & s2[0].address) + (within >> shift)
    return at, level


@kernel(ahead=False)
def entry_at(s2: State, tables: Words, ipa: int, level: int) -> int:
    """Position of the entry for `ipa` at a level that its walk reaches."""
    at = position(s2, s2[0].root_pa) + index_in(s2, ipa, s2[0].root_level)
    for below in range(s2[0].root_level + 1, level + 1):
        at = position(s2, tables[at] & s2[0].address) + index_in(s2, ipa, below)
    return at


@kernel(ahead=False)
def count_leaf(s2: State, level: int, change: int) -> None:
    """Keep the statistics of what is mapped."""
    if level == LAST_LEVEL:
        s2[0].leaves_3 += change
    elif level == 2:
        s2[0].leaves_2 += change
    else:
        s2[0].leaves_1 += change
