"""What differs between architectures' tables: their geometry, and descriptors as masks the generic algorithms work with."""

from dataclasses import dataclass
from itertools import pairwise

LAST_LEVEL = 3
"""The level of pages. Levels are numbered as ARM and KVM do: the first is the higher, the fewer there are."""
_MOST_LEVELS = 7


@dataclass(frozen=True)
class DescriptorFormat:
    """One architecture's stage-2 tables. An entry has eight bytes.

    :ivar shifts: the bytes that an entry of each level maps, as powers of two; the root's level first, that of pages last
    :ivar root_entries: number of entries in the root, concatenated tables counted together
    :ivar largest_leaf: bytes of the largest leaf that there is; none is above level 1
    :ivar present: an entry is valid when it has one of these bits
    :ivar kind: the bits that tell a table from a block, and from an absent entry, at levels above the last
    :ivar table: the value of the `kind` bits of a table entry, complete but for its address
    :ivar address: the bits that hold the output address
    :ivar write: the bit (or bits) that permit writes
    :ivar access: the access flag; 0 where hardware keeps none
    :ivar page: a read-only page entry of normal memory, complete but for its address
    :ivar block: a read-only block entry of normal memory, complete but for its address
    :ivar device: a writable page entry of device memory, complete but for its address
    :raise ValueError: When the algorithms cannot work with such tables.
    """

    shifts: tuple[int, ...]
    root_entries: int
    largest_leaf: int
    present: int
    kind: int
    table: int
    address: int
    write: int
    access: int
    page: int
    block: int
    device: int

    def __post_init__(self) -> None:
        falling = all(above > below for above, below in pairwise(self.shifts))
        if not 2 <= len(self.shifts) <= _MOST_LEVELS or not falling:
            raise ValueError(
                f"levels of {self.shifts} bits: there are 2 to {_MOST_LEVELS}, each of fewer bits"
            )
        if not self.table & self.present or self.table & ~self.kind:
            raise ValueError(f"table entries of {self.table:#x} are not told by the bits {self.kind:#x}")
        if self.largest_leaf not in [1 << shift for shift in self.shifts[-LAST_LEVEL:]]:
            raise ValueError(f"a largest leaf of {self.largest_leaf:#x} bytes: it is one of level 1, 2 or 3")

    @property
    def root_level(self) -> int:
        """The level at which a walk begins."""
        return LAST_LEVEL + 1 - len(self.shifts)

    def shift(self, level: int) -> int:
        """The bytes that an entry of a level maps, as a power of two."""
        return self.shifts[level - self.root_level]

    def entries(self, level: int) -> int:
        """Number of entries in a table of a level."""
        if level == self.root_level:
            return self.root_entries
        return 1 << self.shift(level - 1) - self.shift(level)

    @property
    def page_size(self) -> int:
        """Bytes of a page of guest memory."""
        return 1 << self.shifts[-1]

    @property
    def table_size(self) -> int:
        """Bytes of the largest table below the root."""
        return 8 << max(above - below for above, below in pairwise(self.shifts))
