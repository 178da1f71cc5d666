"""What differs between architectures' descriptors, as masks the generic algorithms work with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DescriptorFormat:
    """One architecture's stage-2 descriptors, three levels of 1 GiB, 2 MiB and 4 KiB.

    :ivar present: an entry is valid when it has one of these bits
    :ivar kind: the bits that tell a table from a block at levels 1 and 2
    :ivar table: the value of the `kind` bits of a table entry, complete but for its address
    :ivar address: the bits that hold the output address
    :ivar write: the bit (or bits) that permit writes
    :ivar access: the access flag; 0 where hardware keeps none
    :ivar page: a read-only page entry of normal memory, complete but for its address
    :ivar block: a read-only block entry of normal memory, complete but for its address
    :ivar device: a writable page entry of device memory, complete but for its address
    :ivar root_entries: number of entries in the level-1 table, concatenated tables counted together
    """

    present: int
    kind: int
    table: int
    address: int
    write: int
    access: int
    page: int
    block: int
    device: int
    root_entries: int
