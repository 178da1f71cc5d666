"""ARMv8's descriptors, by its manual (ARM DDI 0487, D4): a walk that knows the manual's bits, and nothing of the sources."""

from typing import NamedTuple

import pytest
from tests.stage2.support import POOL_PA, RAM_PA, RecordingFlush, read, write

from sterna.memory.address import PAGE_SIZE, PMD_SIZE, PUD_SIZE, Ipa
from sterna.stage2 import arm64
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.fault import Outcome
from sterna.stage2.tables import Stage2

FAULT = None


class Translation(NamedTuple):
    """What a walk gives: physical address, level, and the fields of the block or page descriptor."""

    pa: int
    level: int
    memattr: int
    s2ap: int
    shareability: int
    access_flag: int
    xn: int


def field(descriptor, high, low):
    return descriptor >> low & (1 << high - low + 1) - 1


def walk(stage2, ipa):
    """D4.2: four lookups of 9 bits each, from bits 47 to 39 on; the descriptors of D4.3."""
    table = stage2.root_pa
    for level, low in enumerate((39, 30, 21, 12)):
        assert table % 4096 == 0
        descriptor = int(stage2.tables[(table - POOL_PA) // 8 + field(ipa, low + 8, low)])
        if field(descriptor, 0, 0) == 0:
            return FAULT
        assert field(descriptor, 50, 48) == 0, "RES0"
        assert field(descriptor, 63, 55) == 0, "bits of others' extensions, or ignored"
        if level < 3 and field(descriptor, 1, 1) == 1:
            assert field(descriptor, 54, 51) == field(descriptor, 11, 2) == 0, "ignored in a table descriptor"
            table = field(descriptor, 47, 12) << 12
            continue
        assert field(descriptor, 1, 1) == (level == 3), "a block has bit 1 clear, a page has it set"
        assert level > 0, "no blocks at level 0"
        assert field(descriptor, low - 1, 12) == 0, "RES0" if level == 3 else "RES0 and nT"
        assert field(descriptor, 52, 51) == 0, "neither Contiguous nor DBM"
        return Translation(
            pa=(field(descriptor, 47, low) << low) + field(ipa, low - 1, 0),
            level=level,
            memattr=field(descriptor, 5, 2),
            s2ap=field(descriptor, 7, 6),
            shareability=field(descriptor, 9, 8),
            access_flag=field(descriptor, 10, 10),
            xn=field(descriptor, 54, 53),
        )
    raise AssertionError


def normal(pa, level, *, s2ap=0b11, access_flag=1):
    """Write-back and inner shareable, executable (D4.4, D4.5)."""
    return Translation(pa, level, 0b1111, s2ap, 0b11, access_flag, 0b00)


SIZES = {1: PUD_SIZE, 2: PMD_SIZE, 3: PAGE_SIZE}
BITS = [1 << bit for bit in range(12, 48)]
LAST = (1 << 48) - PUD_SIZE


def make(**arguments):
    return Stage2(arm64.FORMAT, POOL_PA, **arguments)


@pytest.mark.parametrize("level", SIZES)
@pytest.mark.parametrize("at", [0, *(bit for bit in BITS if bit >= PUD_SIZE), LAST], ids=hex)
def test_each_bit_of_an_address_is_translated(at, level):
    stage2 = make(max_leaf=SIZES[level])
    pa = 0x40_0000_0000
    stage2.insert_slot(0, Ipa(at), PUD_SIZE, pa, readonly=False)
    for offset in (0, *(bit for bit in BITS if bit < PUD_SIZE), PUD_SIZE - PAGE_SIZE):
        write(stage2, at + offset)
        assert walk(stage2, at + offset + 0xABC) == normal(pa + offset + 0xABC, level)
    beside = at - 4096 if at else PUD_SIZE
    assert walk(stage2, beside) is FAULT
    assert stage2.entry(Ipa(at))[1] == level


def test_a_read_only_page_has_s2ap_1_and_an_old_one_no_access_flag():
    stage2 = make()
    stage2.insert_slot(0, Ipa(0), 2 * PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, 0)
    assert walk(stage2, 0) == normal(RAM_PA, 2)
    DirtyLog(stage2, RecordingFlush(), 0, Ipa(0), 1024)
    assert walk(stage2, 0) == normal(RAM_PA, 2, s2ap=0b01)
    stage2.age(Ipa(0), PAGE_SIZE)
    assert walk(stage2, 0) == normal(RAM_PA, 2, s2ap=0b01, access_flag=0)
    read(stage2, 0)
    write(stage2, PAGE_SIZE)
    assert walk(stage2, 0) == normal(RAM_PA, 3, s2ap=0b01)
    assert walk(stage2, PAGE_SIZE) == normal(RAM_PA + PAGE_SIZE, 3)


def test_devices_are_ngnre_and_never_executed():
    """D4.5: MemAttr 0b0001 is Device-nGnRE; D4.4: XN[1:0] of 0b10 forbids execution at EL1 and EL0, with and without FEAT_XNX."""
    stage2 = make()
    stage2.map_device(Ipa(0x900_0000), PAGE_SIZE, 0x900_0000)
    assert walk(stage2, 0x900_0123) == Translation(0x900_0123, 3, 0b0001, 0b11, 0b11, 1, 0b10)


def test_there_are_48_bits_and_no_more():
    stage2 = make(max_leaf=1 << 39)
    stage2.insert_slot(0, Ipa(0), 1 << 39, 0x80_0000_0000, readonly=False)
    write(stage2, 0)
    assert walk(stage2, 0) == normal(0x80_0000_0000, 1), "half a TiB is at level 0, where there are no blocks"
    assert stage2.fault(Ipa(1 << 48)) is Outcome.NO_SLOT
    stage2.validate()
