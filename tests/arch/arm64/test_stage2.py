"""ARMv8's descriptors: by its manual (ARM DDI 0487, D4), in a walk that knows nothing of the sources; and by a CPU's own walk."""

import struct
from typing import NamedTuple

import pytest
from tests.stage2.support import POOL_PA, RAM_PA, read, write
from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_MODE_ARM, UC_PROT_ALL, Uc
from unicorn import arm64_const as arm64_registers
from unicorn.unicorn_const import UC_CTL_IO_WRITE, UC_CTL_TLB_FLUSH
from unicorn.unicorn_py3.unicorn import uclib

from sterna.arch.arm64 import stage2 as arm64
from sterna.memory.address import PAGE_SIZE, PMD_SIZE, PUD_SIZE, Ipa
from sterna.memory.bitmap import page_numbers
from sterna.memory.ram import RamBlock
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.fault import FaultResult
from sterna.stage2.tables import Stage2
from sterna.testing.flush import RecordingFlush

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
    assert stage2.fault(Ipa(1 << 48)) is FaultResult.NO_SLOT
    stage2.validate()


SCR_EL3, HCR_EL2, VTCR_EL2 = (3, 6, 1, 1, 0), (3, 4, 1, 1, 0), (3, 4, 2, 1, 2)
VTTBR_EL2, HPFAR_EL2 = (3, 4, 2, 1, 0), (3, 4, 6, 0, 4)
"""op0, op1, CRn, CRm, op2 (D12.2)"""
SCR_NS_RW, HCR_VM_RW = 1 | 1 << 10, 1 | 1 << 31
IPA_BITS = 44
"""As many as a Cortex-A57 has physical address bits; the walk begins at level 0 all the same."""
VTCR = 1 << 31 | 0b100 << 16 | 0b11 << 12 | 0b0101 << 8 | 0b10 << 6 | 64 - IPA_BITS
"""PS 44 bits, TG0 4 KiB, walks inner shareable and write-back, SL0 level 0."""
STORES = [0xF9400024, 0xF9000020, 0x8B020021, 0xF1000463, 0x54FFFF81]
"""ldr x4, [x1]; str x0, [x1]; add x1, x1, x2; subs x3, x3, #1; b.ne STORES"""
ABORTS = (3, 4)


class Cpu:
    """A Cortex-A57 at EL1, its MMU off, behind stage 2: each abort is resolved as a hypervisor does."""

    def __init__(self, stage2, block):
        self.stage2 = stage2
        self.faults = []
        self.uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self.uc.ctl_set_cpu_model(arm64_registers.UC_CPU_ARM64_A57)
        self.uc.mem_map_ptr(stage2.root_pa, stage2.pool_size, UC_PROT_ALL, stage2.pool_hva)
        self.uc.mem_map_ptr(RAM_PA, block.size, UC_PROT_ALL, block.hva)
        self.uc.hook_add(UC_HOOK_INTR, self.on_exception)
        for register, value in (
            (SCR_EL3, SCR_NS_RW),
            (VTCR_EL2, VTCR),
            (VTTBR_EL2, 1 << 48 | stage2.root_pa),
            (HCR_EL2, HCR_VM_RW),
        ):
            self.uc.reg_write(arm64_registers.UC_ARM64_REG_CP_REG, (*self.key(register), value))

    @staticmethod
    def key(register):
        op0, op1, crn, crm, op2 = register
        return crn, crm, op0, op1, op2

    def on_exception(self, uc, number, data):
        ipa = uc.reg_read(arm64_registers.UC_ARM64_REG_CP_REG, self.key(HPFAR_EL2)) << 8
        self.faults.append((number, ipa))
        storm = self.faults[-4:] == [(number, ipa)] * 4
        if number not in ABORTS or storm or self.stage2.fault(Ipa(ipa)) is not FaultResult.RESUME:
            uc.emu_stop()

    def store(self, code, first, pages, stride, value):
        """Store a value to so many pages, `stride` pages apart."""
        parameters = (value, first, stride * PAGE_SIZE, pages)
        for number, parameter in enumerate(parameters):
            self.uc.reg_write(arm64_registers.UC_ARM64_REG_X0 + number, parameter)
        self.uc.emu_start(code, code + 4 * len(STORES))
        assert self.uc.reg_read(arm64_registers.UC_ARM64_REG_X3) == 0, self.faults[-5:]

    def flush(self):
        uclib.uc_ctl(self.uc._uch, UC_CTL_TLB_FLUSH | UC_CTL_IO_WRITE << 30)


@pytest.mark.parametrize("at", [0, 0x4000_0000, 1 << 39, (1 << IPA_BITS) - 4 * PMD_SIZE], ids=hex)
@pytest.mark.parametrize("misaligned", [0, PAGE_SIZE], ids=["blocks", "pages"])
def test_a_cpu_s_writes_are_logged(at, misaligned):
    """The emulated CPU's table walk is others' work. What it writes is what is logged, each page once a harvest."""
    stage2 = make()
    size = 4 * PMD_SIZE
    with RamBlock("ram", size + PMD_SIZE) as block:
        stage2.insert_slot(0, Ipa(at), size, RAM_PA + misaligned, readonly=False)
        block.view[misaligned : misaligned + 4 * len(STORES)] = struct.pack("<5I", *STORES)
        cpu = Cpu(stage2, block)
        cpu.store(at, at + PMD_SIZE, 512, 1, 1)
        log = DirtyLog(stage2, RecordingFlush(cpu.flush), 0, Ipa(at), size // PAGE_SIZE)
        for value, (first, pages, stride) in enumerate(
            ((512, 512, 2), (515, 100, 3), (515, 100, 3)), start=2
        ):
            cpu.store(at, at + first * PAGE_SIZE, pages, stride, value)
            written = list(range(first, first + pages * stride, stride))
            assert page_numbers(log.get()).tolist() == written
            words = block.data[misaligned:].view("<u8")[: size // 8 : PAGE_SIZE // 8]
            assert [page for page, word in enumerate(words.tolist()) if word == value] == written
        stage2.age(Ipa(at), size)
        cpu.flush()
        cpu.store(at, at + 515 * PAGE_SIZE, 1, 1, 9)
        assert stage2.statistics()["faults_access_flag"] == 2, (
            "of the code's page, and of the page that is written"
        )
        assert page_numbers(log.get()).tolist() == [515]
    stage2.validate()
