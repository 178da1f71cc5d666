"""The GICv2 as a polling guest sees it."""

import pytest

from sterna.boards.virt import BOARD as VIRT
from sterna.machine.devices.gic.controller import Gic, GicCpuInterface, GicDistributor
from sterna.machine.devices.gic.registers import SPURIOUS, CpuInterface, Distributor

TIMER, UART = 27, 33


class Cpu:
    """What the GIC told a CPU."""

    def __init__(self):
        self.wakes = 0
        self.interrupt = False
        self.timer_wakes = None

    def set_interrupt(self, level):
        self.interrupt = level
        self.wakes += level

    def set_timer_wakes(self, enabled):
        self.timer_wakes = enabled


class Board:
    """A GIC with its CPUs, accessed as a guest does."""

    def __init__(self, cpus):
        self.cpus = [Cpu() for _ in range(cpus)]
        self.gic = Gic(VIRT.gic, self.cpus)
        self.distributor = GicDistributor(self.gic)
        self.interface = GicCpuInterface(self.gic)

    def read(self, offset, cpu=0, size=4):
        return self.distributor.mmio_read(offset, size, cpu)

    def write(self, offset, value, cpu=0, size=4):
        self.distributor.mmio_write(offset, size, value, cpu)

    def get(self, offset, cpu=0):
        return self.interface.mmio_read(offset, 4, cpu)

    def set(self, offset, value, cpu=0):
        self.interface.mmio_write(offset, 4, value, cpu)

    def switch_on(self):
        self.write(Distributor.CTLR, 1)
        for cpu in range(len(self.cpus)):
            self.set(CpuInterface.CTLR, 1, cpu)
            self.set(CpuInterface.PMR, 0xFF, cpu)

    def enable(self, irq, cpu=0, targets=1):
        self.write(Distributor.ISENABLER + 4 * (irq // 32), 1 << irq % 32, cpu)
        self.write(Distributor.ITARGETSR + irq, targets, cpu, size=1)


@pytest.fixture
def board():
    made = Board(2)
    made.switch_on()
    return made


def test_identification():
    board = Board(4)
    assert board.read(Distributor.TYPER) == (288 // 32 - 1) | 3 << 5
    assert board.read(Distributor.IIDR) == 0x43B
    assert board.read(0xFE8) == 0x2B, "ICPIDR2: architecture 2"
    assert board.get(CpuInterface.IIDR) >> 16 == 2


def test_sgis_are_always_enabled_others_not(board):
    assert board.read(Distributor.ISENABLER) == 0xFFFF
    board.write(Distributor.ICENABLER, 0xFFFF_FFFF)
    assert board.read(Distributor.ISENABLER) == 0xFFFF
    assert board.read(Distributor.ISENABLER + 4) == 0


def test_private_interrupts_are_banked(board):
    board.write(Distributor.ISENABLER, 1 << TIMER, cpu=1)
    assert board.read(Distributor.ISENABLER, cpu=1) == 0xFFFF | 1 << TIMER
    assert board.read(Distributor.ISENABLER, cpu=0) == 0xFFFF
    board.write(Distributor.IPRIORITYR + 28, 0xA0, cpu=1, size=1)
    assert board.read(Distributor.IPRIORITYR + 28, cpu=1) == 0xA0
    assert board.read(Distributor.IPRIORITYR + 28, cpu=0) == 0
    assert board.read(Distributor.ITARGETSR, cpu=0) == 0x01010101
    assert board.read(Distributor.ITARGETSR, cpu=1) == 0x02020202


def test_accesses_of_all_widths(board):
    board.write(Distributor.IPRIORITYR + 40, 0x44332211)
    assert [board.read(Distributor.IPRIORITYR + 40 + i, size=1) for i in range(4)] == [0x11, 0x22, 0x33, 0x44]
    assert board.read(Distributor.IPRIORITYR + 42, size=2) == 0x4433
    board.write(Distributor.ICFGR + 8, 0xFFFF_FFFF)
    assert board.read(Distributor.ICFGR + 8) == 0xAAAA_AAAA
    board.write(Distributor.ICFGR, 0)
    assert board.read(Distributor.ICFGR) == 0xAAAA_AAAA, "SGIs are edge triggered"


def test_one_cpu_has_no_targets():
    board = Board(1)
    board.switch_on()
    board.enable(UART, targets=0)
    assert board.read(Distributor.ITARGETSR + 32) == 0
    board.gic.line(UART)(True)
    assert board.get(CpuInterface.IAR) == UART


def test_a_line_that_rises_wakes_its_target(board):
    board.enable(UART, targets=2)
    raised = board.gic.line(UART)
    raised(True)
    assert (board.cpus[0].wakes, board.cpus[1].wakes) == (0, 1)
    assert board.read(Distributor.ISPENDR + 4) == 1 << 1
    assert board.get(CpuInterface.HPPIR, cpu=1) == UART
    assert board.get(CpuInterface.HPPIR, cpu=0) == SPURIOUS
    assert board.get(CpuInterface.IAR, cpu=1) == UART
    assert board.get(CpuInterface.IAR, cpu=1) == SPURIOUS, "it is active"
    raised(False)
    board.set(CpuInterface.EOIR, UART, cpu=1)
    assert board.get(CpuInterface.IAR, cpu=1) == SPURIOUS
    assert board.read(Distributor.ISPENDR + 4) == 0


def test_a_level_still_high_is_pending_again_after_eoi(board):
    board.enable(UART)
    board.gic.line(UART)(True)
    assert board.get(CpuInterface.IAR) == UART
    board.set(CpuInterface.EOIR, UART)
    assert board.get(CpuInterface.IAR) == UART


def test_an_edge_is_taken_once(board):
    board.write(Distributor.ICFGR + 8, 2 << 2)
    board.enable(UART)
    line = board.gic.line(UART)
    line(True)
    line(False)
    assert board.get(CpuInterface.IAR) == UART
    board.set(CpuInterface.EOIR, UART)
    assert board.get(CpuInterface.IAR) == SPURIOUS


@pytest.mark.parametrize(("filter_", "woken"), [(0, {1, 2}), (1, {0, 2, 3}), (2, {1})])
def test_sgi_targets(filter_, woken):
    board = Board(4)
    board.switch_on()
    board.write(Distributor.SGIR, filter_ << 24 | 0b0110 << 16 | 5, cpu=1)
    assert {i for i, cpu in enumerate(board.cpus) if cpu.wakes} == woken
    for cpu in woken:
        assert board.get(CpuInterface.IAR, cpu) == 5 | 1 << 10, "the sender is CPU 1"


def test_sgi_from_two_senders_is_taken_twice():
    board = Board(4)
    board.switch_on()
    for sender in (3, 1):
        board.write(Distributor.SGIR, 1 << 16 | 7, cpu=sender)
    senders = []
    for _ in range(2):
        value = board.get(CpuInterface.IAR)
        assert value & 0x3FF == 7
        senders.append(value >> 10)
        board.set(CpuInterface.EOIR, value)
    assert senders == [1, 3]
    assert board.get(CpuInterface.IAR) == SPURIOUS


def test_software_set_and_clear_of_sgis(board):
    board.write(Distributor.SPENDSGIR, 0b10, size=1)
    assert board.read(Distributor.SPENDSGIR, size=1) == 0b10
    assert board.get(CpuInterface.HPPIR) == 0 | 1 << 10
    board.write(Distributor.CPENDSGIR, 0b10, size=1)
    assert board.get(CpuInterface.HPPIR) == SPURIOUS


def test_priorities_decide_and_preempt(board):
    for irq, priority in ((40, 0x80), (41, 0x40), (42, 0x40)):
        board.enable(irq)
        board.write(Distributor.IPRIORITYR + irq, priority, size=1)
    board.gic.line(40)(True)
    assert board.get(CpuInterface.IAR) == 40
    assert board.get(CpuInterface.RPR) == 0x80
    board.gic.line(42)(True)
    board.gic.line(41)(True)
    assert board.get(CpuInterface.IAR) == 41, "the lower number of two with one priority"
    assert board.get(CpuInterface.IAR) == SPURIOUS, "an equal priority does not preempt"
    board.gic.line(41)(False)
    board.set(CpuInterface.EOIR, 41)
    assert board.get(CpuInterface.RPR) == 0x80
    assert board.get(CpuInterface.IAR) == 42
    board.set(CpuInterface.EOIR, 42)
    board.set(CpuInterface.EOIR, 40)
    assert board.get(CpuInterface.RPR) == 0xFF


@pytest.mark.parametrize("missing", ["distributor", "interface", "mask", "enable"])
def test_the_timer_wakes_only_when_all_is_set(missing):
    board = Board(2)
    assert [cpu.timer_wakes for cpu in board.cpus] == [False, False]
    if missing != "distributor":
        board.write(Distributor.CTLR, 1)
    if missing != "interface":
        board.set(CpuInterface.CTLR, 1, cpu=1)
    if missing != "mask":
        board.set(CpuInterface.PMR, 0xFF, cpu=1)
    if missing != "enable":
        board.write(Distributor.ISENABLER, 1 << TIMER, cpu=1)
    assert board.cpus[1].timer_wakes is False
    board.switch_on()
    board.write(Distributor.ISENABLER, 1 << TIMER, cpu=1)
    assert [cpu.timer_wakes for cpu in board.cpus] == [False, True]
    board.write(Distributor.ICENABLER, 1 << TIMER, cpu=1)
    assert board.cpus[1].timer_wakes is False


def test_saved_state_has_the_timers_line_and_loads_without_it(board):
    board.write(Distributor.ISENABLER, 1 << TIMER, cpu=1)
    registers, pending = board.gic.snapshot([True, True])
    assert registers.irqs[TIMER].level == 0b11
    assert pending == [SPURIOUS, TIMER], "CPU 0 has not enabled it"
    other = Board(2)
    other.gic.restore(registers)
    assert other.cpus[1].timer_wakes is True
    assert other.gic.pending([False, False])[1] == SPURIOUS


def test_holes_read_as_zero(board):
    for offset in (0x020, 0x0FC, 0xD00, 0xF40, 0x2000):
        board.write(offset, 0xFFFF_FFFF)
        assert board.read(offset) == 0
    assert board.interface.mmio_read(CpuInterface.IAR, 1, 0) == 0
    assert board.get(0x1000) == 0


def test_identification_byte_by_byte(board):
    assert [board.read(0xFD0 + 4 * i) for i in range(12)] == [
        0x04,
        0,
        0,
        0,
        0x90,
        0xB4,
        0x2B,
        0,
        0x0D,
        0xF0,
        0x05,
        0xB1,
    ]
    assert [board.read(0xFD1 + i, size=1) for i in range(3)] == [0, 0, 0]
    assert [board.read(Distributor.TYPER + i, size=1) for i in range(4)] == [8 | 1 << 5, 0, 0, 0]
    assert [board.read(Distributor.IIDR + i, size=1) for i in range(5)] == [0x3B, 0x04, 0, 0, 0]
    assert board.get(CpuInterface.IIDR) == 0x2043B


def test_reset():
    board = Board(2)
    for offset in range(0, 0xFD0, 4):
        if offset in (Distributor.TYPER, Distributor.IIDR):
            continue
        sgis = {Distributor.ISENABLER: 0xFFFF, Distributor.ICENABLER: 0xFFFF, Distributor.ICFGR: 0xAAAA_AAAA}
        private = 0x01010101 if Distributor.ITARGETSR <= offset < Distributor.ITARGETSR + 32 else 0
        assert board.read(offset) == sgis.get(offset, private), hex(offset)
    for cpu in (0, 1):
        values = {offset: board.get(offset, cpu) for offset in range(0, 0x100, 4)}
        told = {
            CpuInterface.IAR: SPURIOUS,
            CpuInterface.HPPIR: SPURIOUS,
            CpuInterface.RPR: 0xFF,
            CpuInterface.ABPR: 1,
            CpuInterface.IIDR: 0x2043B,
        }
        assert values == dict.fromkeys(values, 0) | told


@pytest.mark.parametrize(
    ("offset", "ones", "zeros"),
    [
        (CpuInterface.CTLR, 0x1F, 0),
        (CpuInterface.PMR, 0xFF, 0),
        (CpuInterface.BPR, 7, 0),
        (CpuInterface.ABPR, 7, 1),
    ],
)
def test_cpu_interfaces_are_written_whole(board, offset, ones, zeros):
    board.set(offset, 0xFFFF_FFFF, cpu=1)
    assert board.get(offset, cpu=1) == ones
    board.interface.mmio_write(offset, 1, 0, 1)
    board.interface.mmio_write(offset + 1, 4, 0, 1)
    assert board.get(offset, cpu=1) == ones
    board.set(offset, 0, cpu=1)
    assert board.get(offset, cpu=1) == zeros


@pytest.mark.parametrize(
    ("to_set", "to_clear"),
    [
        (Distributor.ISENABLER, Distributor.ICENABLER),
        (Distributor.ISPENDR, Distributor.ICPENDR),
        (Distributor.ISACTIVER, Distributor.ICACTIVER),
    ],
)
@pytest.mark.parametrize("irq", [16, 27, 31, 32, 39, 40, 255, 287])
def test_bits_are_set_and_cleared_one_by_one(board, to_set, to_clear, irq):
    word, bit = 4 * (irq // 32), 1 << irq % 32
    always = 0xFFFF if to_set == Distributor.ISENABLER and word == 0 else 0
    other = 0 if irq >= 32 else bit
    board.write(to_set + word, bit)
    for register in (to_set, to_clear):
        assert board.read(register + word) == always | bit
        assert board.read(register + word, cpu=1) == always | bit & ~other, "private ones are each CPU's own"
    board.write(to_set + word, 0)
    board.write(to_clear + word, ~bit & 0xFFFF_FFFF)
    board.write(to_clear + word, other, cpu=1)
    assert board.read(to_set + word) == always | bit
    board.write(to_clear + word, bit)
    for register in (to_set, to_clear):
        assert board.read(register + word) == always
    # Behind the last there are none.
    board.write(to_set + 4 * (288 // 32), 0xFFFF_FFFF)
    assert board.read(to_set + 4 * (288 // 32)) == 0


def test_groups_priorities_targets_and_triggers_end_with_the_last_interrupt(board):
    board.write(Distributor.IGROUPR, 1 << TIMER | 1, cpu=1)
    assert (board.read(Distributor.IGROUPR, cpu=1), board.read(Distributor.IGROUPR)) == (1 << TIMER | 1, 0)
    board.write(Distributor.IGROUPR, 1, cpu=1)
    assert board.read(Distributor.IGROUPR, cpu=1) == 1
    board.write(Distributor.IGROUPR + 4 * 8, 0xFFFF_FFFF)
    board.write(Distributor.IGROUPR + 4 * 9, 0xFFFF_FFFF)
    assert [board.read(Distributor.IGROUPR + 4 * i) for i in (8, 9)] == [0xFFFF_FFFF, 0]
    for irq, kept in ((31, 0x5A), (32, 0x5A), (287, 0x5A), (288, 0)):
        board.write(Distributor.IPRIORITYR + irq, 0x5A, size=1)
        assert board.read(Distributor.IPRIORITYR + irq, size=1) == kept
    assert board.read(Distributor.IPRIORITYR + 28) == 0x5A00_0000
    for irq, kept in ((31, 1), (32, 0b11), (287, 0b11), (288, 0)):
        board.write(Distributor.ITARGETSR + irq, 0xFF, size=1)
        assert board.read(Distributor.ITARGETSR + irq, size=1) == kept
    for irq, kept in ((15, 0xAA), (16, 0b10), (33, 0b1000), (287, 0b1000_0000), (288, 0)):
        at = Distributor.ICFGR + irq // 4
        board.write(at, 2 << 2 * (irq % 4), size=1)
        assert board.read(at, size=1) == kept
    board.write(Distributor.ICFGR + 33 // 4, 0b0100, size=1)
    assert board.read(Distributor.ICFGR + 33 // 4, size=1) == 0, "the low bit of a field means nothing"


def test_control_has_its_two_bits_in_the_first_byte(board):
    board.write(Distributor.CTLR, 0xFF, size=1)
    assert board.read(Distributor.CTLR) == 3
    for at in (1, 2, 3):
        board.write(Distributor.CTLR + at, 0, size=1)
    assert board.read(Distributor.CTLR) == 3
    board.write(Distributor.CTLR, 0)
    assert board.read(Distributor.CTLR) == 0


@pytest.mark.parametrize(
    ("by", "point"),
    [
        *(("group 0", point) for point in range(8)),
        *(("group 1", point) for point in range(7)),
        *(("common", point) for point in range(8)),
    ],
)
def test_the_binary_point_says_what_preempts(board, point, by):
    """Only bits above it count (3.3.3); of group 1 the point is ABPR's, one lower, unless CTLR says that BPR is for both."""
    if by != "group 0":
        board.write(Distributor.CTLR, 2)
        board.set(CpuInterface.CTLR, 0x12 if by == "common" else 2)
        board.write(Distributor.IGROUPR + 4, 0xFFFF_FFFF)
    if by == "group 1":
        board.set(CpuInterface.ABPR, point + 1)
        board.set(CpuInterface.BPR, 7 - point)
    else:
        board.set(CpuInterface.BPR, point)
        board.set(CpuInterface.ABPR, 7 - point)
    low = min(0x80 + (2 << point) - 1, 0xFE)
    level = 0x80 if point < 7 else 0
    for irq, priority in ((40, low), (41, 0x80), (42, 0x7F)):
        board.enable(irq)
        board.write(Distributor.IPRIORITYR + irq, priority, size=1)
    board.gic.line(40)(True)
    assert board.get(CpuInterface.IAR) == 40
    assert board.get(CpuInterface.RPR) == level
    board.gic.line(41)(True)
    assert board.get(CpuInterface.HPPIR) == 41
    assert board.get(CpuInterface.IAR) == SPURIOUS, "of the same group of priorities"
    board.gic.line(42)(True)
    assert board.get(CpuInterface.IAR) == (42 if point < 7 else SPURIOUS)


def test_active_priorities_are_bits_and_end_in_order(board):
    nested = {50: 0xC0, 51: 0x84, 52: 0x82, 53: 0x3E, 54: 0x04}
    for irq, priority in nested.items():
        board.enable(irq)
        board.write(Distributor.IPRIORITYR + irq, priority, size=1)
        board.gic.line(irq)(True)
        assert board.get(CpuInterface.IAR) == irq
        assert board.get(CpuInterface.RPR) == priority
        board.gic.line(irq)(False)
    assert [board.get(CpuInterface.APR + 4 * i) for i in range(5)] == [1 << 2 | 1 << 31, 0, 0b110, 1, 0]
    assert board.get(CpuInterface.APR, cpu=1) == 0
    # What is not active, or no interrupt, ends nothing.
    for wrong in (49, 288, 1022, SPURIOUS):
        board.set(CpuInterface.EOIR, wrong)
    assert board.get(CpuInterface.RPR) == 0x04
    running = []
    for irq in reversed(nested):
        board.set(CpuInterface.EOIR, irq)
        assert not board.read(Distributor.ISACTIVER + 4) >> (irq - 32) & 1
        running.append(board.get(CpuInterface.RPR))
    assert running == [0x3E, 0x82, 0x84, 0xC0, 0xFF]
    assert [board.get(CpuInterface.APR + 4 * i) for i in range(4)] == [0, 0, 0, 0]


def test_an_interrupt_must_be_above_the_mask(board):
    board.enable(UART)
    board.gic.line(UART)(True)
    board.write(Distributor.IPRIORITYR + UART, 0x80, size=1)
    for mask, seen in ((0x80, SPURIOUS), (0x81, UART), (0, SPURIOUS), (0xFF, UART)):
        board.set(CpuInterface.PMR, mask)
        assert board.get(CpuInterface.HPPIR) == seen
    assert board.cpus[0].wakes == 3, "when its line rose, and at each mask that let it through again"
    board.write(Distributor.IPRIORITYR + UART, 0xFF, size=1)
    assert board.get(CpuInterface.HPPIR) == SPURIOUS


@pytest.mark.parametrize("group", [0, 1])
def test_each_group_has_its_enables(board, group):
    board.enable(UART)
    board.write(Distributor.IGROUPR + 4, group << 1)
    board.gic.line(UART)(True)
    for distributor in range(4):
        for interface in range(4):
            board.write(Distributor.CTLR, distributor)
            board.set(CpuInterface.CTLR, interface)
            reaches = bool(distributor & interface & 1 << group)
            assert board.get(CpuInterface.HPPIR) == (UART if reaches else SPURIOUS)
            assert board.cpus[0].interrupt is reaches


def test_pending_by_software_is_taken_once(board):
    board.enable(UART)
    board.write(Distributor.ISPENDR + 4, 1 << 1)
    assert board.get(CpuInterface.IAR) == UART
    board.write(Distributor.ISPENDR + 4, 1 << 1)
    assert board.get(CpuInterface.HPPIR) == SPURIOUS, "active and pending: not before it ends"
    board.set(CpuInterface.EOIR, UART)
    assert board.get(CpuInterface.IAR) == UART
    board.set(CpuInterface.EOIR, UART)
    assert board.get(CpuInterface.IAR) == SPURIOUS


def test_a_cpus_line_is_a_level(board):
    """It rises with the first interrupt and falls with the last: others in between change nothing."""
    board.enable(40)
    board.enable(UART)
    board.write(Distributor.IPRIORITYR + 40, 0x80, size=1)
    board.gic.line(40)(True)
    board.gic.line(40)(True)
    board.write(Distributor.IPRIORITYR + 50, 0x80, size=1)
    assert board.cpus[0].wakes == 1
    board.gic.line(UART)(True)
    board.gic.line(UART)(False)
    assert (board.cpus[0].wakes, board.cpus[0].interrupt) == (1, True)
    board.gic.line(40)(False)
    assert board.cpus[0].interrupt is False


@pytest.mark.parametrize(("priority", "preempts"), [(0x40, False), (0x20, True)])
def test_what_is_active_holds_back_what_does_not_preempt_it(board, priority, preempts):
    for irq in (40, 41):
        board.enable(irq)
        board.write(Distributor.IPRIORITYR + irq, 0x40 if irq == 40 else priority, size=1)
    board.gic.line(40)(True)
    assert board.get(CpuInterface.IAR) == 40
    assert board.cpus[0].interrupt is False
    board.gic.line(41)(True)
    assert board.cpus[0].interrupt is preempts
    board.gic.line(40)(False)
    board.set(CpuInterface.EOIR, 40)
    assert board.cpus[0].interrupt is True


def test_sgis_by_the_sender(board):
    board.write(Distributor.SGIR, 3 << 24 | 0xFF << 16 | 4)
    board.write(Distributor.SGIR, 0xFC << 16 | 4)
    board.write(Distributor.SGIR + 1, 0xFF, size=1)
    board.write(Distributor.SGIR, 0xFF << 16 | 4, size=2)
    board.write(Distributor.ISPENDR, 1 << 4)
    assert [cpu.wakes for cpu in board.cpus] == [0, 0], "no filter, no such CPU, half a word, not by ISPENDR"
    board.write(Distributor.SPENDSGIR + 15, 0xFF, size=1)
    assert board.read(Distributor.SPENDSGIR + 15, size=1) == 0b11, "from the CPUs that there are"
    assert board.read(Distributor.CPENDSGIR + 12) == 0b11 << 24
    assert board.read(Distributor.CPENDSGIR + 12, cpu=1) == 0
    board.write(Distributor.CPENDSGIR + 15, 0b01, size=1)
    assert board.get(CpuInterface.HPPIR) == 15 | 1 << 10
    board.write(Distributor.SPENDSGIR + 15, 0, size=1)
    assert board.get(CpuInterface.IAR) == 15 | 1 << 10
    assert board.read(Distributor.SPENDSGIR + 15, size=1) == 0
    assert board.read(Distributor.ISPENDR) == 0
    assert board.read(Distributor.ISACTIVER) == 1 << 15


def test_a_copy_of_the_state_shares_nothing_and_keeps_the_lines_of_shared_interrupts(board):
    board.enable(UART)
    raised = board.gic.line(UART)
    raised(True)
    registers, pending = board.gic.snapshot([False, True])
    assert pending == [UART, SPURIOUS]
    assert board.gic.snapshot([False, False])[0].irqs[TIMER].level == 0
    raised(False)
    for offset in (Distributor.CTLR, Distributor.ITARGETSR + 32):
        board.write(offset, 0)
    board.set(CpuInterface.PMR, 0)
    other = Board(2)
    other.gic.restore(registers)
    assert other.get(CpuInterface.IAR) == UART
    assert other.gic.registers.irqs[TIMER].level == 0, "private lines belong to the vCPUs"
    other.set(CpuInterface.EOIR, UART)
    other.gic.line(UART)(False)
    assert other.get(CpuInterface.IAR) == SPURIOUS
