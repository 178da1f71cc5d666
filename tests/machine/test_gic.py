"""The GICv2 as a polling guest sees it."""

import pytest

from sterna.machine.devices.gic import (
    CpuInterface,
    Distributor,
    Gic,
    GicCpuInterface,
    GicDistributor,
)
from sterna.machine.devices.gicregisters import SPURIOUS

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
        self.gic = Gic(288, self.cpus)
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
    registers, pending = board.gic.save([True, True])
    assert registers.irqs[TIMER].level == 0b11
    assert pending == [SPURIOUS, TIMER], "CPU 0 has not enabled it"
    other = Board(2)
    other.gic.load(registers)
    assert other.cpus[1].timer_wakes is True
    assert other.gic.highest_pending(1) == SPURIOUS


def test_holes_read_as_zero(board):
    for offset in (0x020, 0x0FC, 0xD00, 0xF40, 0x2000):
        board.write(offset, 0xFFFF_FFFF)
        assert board.read(offset) == 0
    assert board.interface.mmio_read(CpuInterface.IAR, 1, 0) == 0
    assert board.get(0x1000) == 0
