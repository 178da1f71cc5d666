"""Stage 2 without a CPU, in each format: accesses made as the MMU would make them."""

import numpy as np

from sterna.hypervisor.architecture import ARCHITECTURES
from sterna.memory.address import Ipa
from sterna.stage2.fault import FaultResult
from sterna.stage2.format import DescriptorFormat
from sterna.stage2.tables import Stage2

POOL_PA = 0x10_0000_0000
RAM_PA = 0x20_0000_0000

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


def in_words(size: int) -> str:
    return next(
        f"{size >> shift}{unit}" for unit, shift in (("g", 30), ("m", 20), ("k", 10)) if size >> shift
    )


class Geometry:
    """A format and what it makes of memory, for tests that hold for all. Comments in these say what that is on ARM.

    :ivar page: bytes of a page: 4 KiB
    :ivar block: bytes of a block one level above pages: 2 MiB
    :ivar large: bytes of a block one level further up: 1 GiB
    :ivar pages: pages of a block: 512
    :ivar blocks: blocks of a large one: 512
    :ivar end: where the IPA space ends
    :ivar upper: tables between the root and that of large blocks, which those beside each other have in common
    :ivar leaves: statistics of what is mapped: large blocks, blocks, pages
    """

    def __init__(self, name: str, form: DescriptorFormat) -> None:
        self.name = name
        self.format = form
        self.page, self.block, self.large = (1 << form.shift(level) for level in (3, 2, 1))
        sizes = [in_words(size) for size in (self.large, self.block, self.page)]
        self.leaves = [
            f"{kind}_{size}" for kind, size in zip(("blocks", "blocks", "pages"), sizes, strict=True)
        ]
        self.pages, self.blocks = self.block // self.page, self.large // self.block
        self.end = form.root_entries << form.shifts[0]
        self.upper = 1 - form.root_level

    def make(self, **arguments):
        return Stage2(self.format, POOL_PA, **{"pool_size": self.pool(1024)} | arguments)

    def pool(self, tables):
        """Size of a pool of the root and so many tables."""
        size = self.format.table_size
        return -(-8 * self.format.root_entries // size) * size + tables * size

    def counts(self, stage2):
        """How many leaves are mapped: large blocks, blocks, pages."""
        statistics = stage2.statistics()
        return [statistics[name] for name in self.leaves]

    def writable(self, stage2, ipa):
        return bool(stage2.entry(Ipa(ipa))[0] & self.format.write)

    def tables_in_use(self, stage2):
        """The tables below the root: the position of each, and of the entry that points there."""
        form, found = self.format, {}
        at = np.arange(form.root_entries)
        for level in range(form.root_level, 3):
            values = stage2.tables[at]
            pointers = (values & form.present != 0) & (values & form.kind == form.table)
            firsts = (values[pointers] & form.address) - POOL_PA >> 3
            found |= dict(zip(firsts.tolist(), at[pointers].tolist(), strict=True))
            at = (firsts[:, None] + np.arange(form.entries(level + 1))).ravel()
        return found


GEOMETRIES = [Geometry(name, form) for name in ARCHITECTURES if (form := ARCHITECTURES.get(name).stage2)]
GEOMETRIES.append(Geometry("made_up", MADE_UP))


def allowed(stage2, ipa, *, write):
    """Whether the MMU would let an access through without a fault."""
    form = stage2.format
    entry, _ = stage2.entry(Ipa(ipa))
    return bool(entry) and bool(entry & form.access) and (not write or bool(entry & form.write))


def access(stage2, ipa, *, write):
    """Make an access: the outcome, RESUME when it went through. More than three faults in a row are a refault storm."""
    for _ in range(4):
        if allowed(stage2, ipa, write=write):
            return FaultResult.RESUME
        outcome = stage2.fault(Ipa(ipa & ~(stage2.format.page_size - 1)))
        if outcome is not FaultResult.RESUME:
            return outcome
    raise AssertionError(f"the access to {ipa:#x} faults for ever")


def write(stage2, ipa):
    assert access(stage2, ipa, write=True) is FaultResult.RESUME


def read(stage2, ipa):
    assert access(stage2, ipa, write=False) is FaultResult.RESUME
