"""ARMv7's descriptors and registers, by its manual (ARM DDI 0406C.c)."""

from tests.stage2.support import POOL_PA, RAM_PA, write

from sterna.arch.armv7 import stage2 as armv7
from sterna.memory.address import PAGE_SIZE, PMD_SIZE, PUD_SIZE, Ipa
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.fault import FaultResult
from sterna.stage2.tables import Stage2
from sterna.testing.flush import RecordingFlush

RAM = Ipa(0x4000_0000)


def make():
    return Stage2(armv7.FORMAT, POOL_PA)


def test_descriptors_are_the_architectures():
    """B3.6.1 and B3.6.2: write-back, inner shareable, accessed."""
    stage2 = make()
    stage2.insert_slot(0, RAM, 2 * PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, RAM)
    assert stage2.entry(RAM) == (RAM_PA | 0x7FD, 2)
    stage2.protect(RAM, PAGE_SIZE)
    assert stage2.entry(RAM) == (RAM_PA | 0x77D, 2)
    DirtyLog(stage2, RecordingFlush(), 0, RAM, 1024)
    write(stage2, RAM + PAGE_SIZE)
    assert stage2.entry(Ipa(RAM + PAGE_SIZE)) == (RAM_PA + PAGE_SIZE | 0x7FF, 3)
    assert stage2.entry(RAM) == (RAM_PA | 0x77F, 3)


def test_devices_are_for_data_only():
    """B3.6.2: device memory, readable and writable, never executed (XN is bit 54)."""
    stage2 = make()
    stage2.map_device(Ipa(0x900_0000), 2 * PAGE_SIZE, 0x900_0000)
    for at in (0x900_0000, 0x900_1000):
        assert stage2.entry(Ipa(at)) == (0x0040_0000_0000_07C7 | at, 3)


def test_root_is_two_concatenated_tables():
    """A 40-bit IPA: 1024 level-1 entries; the last GiB is reached, the first address behind it is nobody's."""
    stage2 = make()
    assert stage2.root_pa == POOL_PA
    last = Ipa((1 << 40) - PUD_SIZE)
    stage2.insert_slot(0, last, PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, last)
    assert stage2.entry(last)[1] == 2
    assert int(stage2.tables[1023]) == POOL_PA + 2 * PAGE_SIZE | 0b11
    assert stage2.fault(Ipa(1 << 40)) is FaultResult.NO_SLOT


def test_registers_are_the_architecture_s():
    """B4.1.159, B4.1.160, B4.1.62."""
    assert armv7.VTCR == 0x8000_3558
    assert armv7.HCR_VM == 1
    assert armv7.vttbr(0x10_0000_0000, 3) == 0x0003_0010_0000_0000
    assert armv7.FORMAT.address == 0xFF_FFFF_F000
