"""Stage 2 without a CPU: accesses made as the MMU would make them."""

import numpy as np

from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.stage2 import armv7
from sterna.stage2.fault import Outcome
from sterna.stage2.format import DescriptorFormat
from sterna.stage2.tables import Stage2

POOL_PA = 0x10_0000_0000
RAM_PA = 0x20_0000_0000
WRITE, ACCESS = armv7.FORMAT.write, armv7.FORMAT.access

MADE_UP = DescriptorFormat(
    # Tables of 4, 8, 16 and 8 entries, and pages of 16 KiB: nothing that the real formats have in common.
    shifts=(26, 24, 21, 17, 14),
    root_entries=256,
    largest_leaf=1 << 21,
    # As RISC-V's: what permits nothing is a table, at any level.
    present=0b0001,
    kind=0b1111,
    table=0b0001,
    address=((1 << 51) - 1) & ~0x7F,
    write=0b0100,
    access=0b100_0000,
    page=0b100_1011,
    block=0b100_1011,
    device=0b100_0111,
)


def make(**arguments):
    return Stage2(armv7.FORMAT, POOL_PA, **arguments)


def tables_in_use(stage2):
    """The tables below the root: the position of each, and of the entry that points there."""
    s2, found = stage2.state[0], {}
    spans = [(0, int(s2["root_entries"]))]
    for _ in range(2):
        entries = np.array([at for first, count in spans for at in range(first, first + count)], dtype=int)
        values = stage2.tables[entries]
        pointers = (values & s2["present"] != 0) & (values & s2["kind"] == s2["table"])
        below = {
            ((int(value) & int(s2["address"])) - POOL_PA) >> 3: int(entry)
            for entry, value in zip(entries[pointers], values[pointers], strict=True)
        }
        found |= below
        spans = [(first, 512) for first in below]
    return found


def allowed(stage2, ipa, *, write):
    """Whether the MMU would let an access through without a fault."""
    entry, _ = stage2.entry(Ipa(ipa))
    return bool(entry) and bool(entry & ACCESS) and (not write or bool(entry & WRITE))


def access(stage2, ipa, *, write):
    """Make an access: the outcome, RESUME when it went through. More than three faults in a row are a refault storm."""
    for _ in range(4):
        if allowed(stage2, ipa, write=write):
            return Outcome.RESUME
        outcome = stage2.fault(Ipa(ipa & ~(PAGE_SIZE - 1)))
        if outcome is not Outcome.RESUME:
            return outcome
    raise AssertionError(f"the access to {ipa:#x} faults for ever")


def write(stage2, ipa):
    assert access(stage2, ipa, write=True) is Outcome.RESUME


def read(stage2, ipa):
    assert access(stage2, ipa, write=False) is Outcome.RESUME
