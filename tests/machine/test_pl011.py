"""The PL011's registers."""

import pytest

from sterna.boards.virt import BOARD as VIRT
from sterna.machine.devices.pl011 import FIFO_DEPTH, Flag, Interrupt, Pl011, Register
from sterna.machine.serial import MemorySerial

FIFO_ON = 0x10


class Uart:
    """A UART, its line, and the level of its interrupt."""

    def __init__(self):
        self.line = MemorySerial()
        self.irq = False
        self.device = Pl011(VIRT.uarts[0], self.line, self._set)
        self.line.start(self.device.receive)

    def _set(self, level):
        self.irq = level

    def read(self, register):
        return self.device.mmio_read(register, 4, 0)

    def write(self, register, value):
        self.device.mmio_write(register, 4, value, 0)


@pytest.fixture
def uart():
    return Uart()


def test_output_goes_to_the_line(uart):
    for byte in b"hi\xff":
        uart.write(Register.DR, 0x100 | byte)
    assert uart.line.output == b"hi\xff"
    assert uart.read(Register.FR) == Flag.TXFE | Flag.RXFE


def test_input_in_order_through_a_full_fifo(uart):
    uart.write(Register.LCR_H, FIFO_ON)
    text = bytes(range(40))
    uart.line.send(text)
    assert uart.read(Register.FR) == Flag.TXFE | Flag.RXFF
    assert bytes(uart.read(Register.DR) for _ in text) == text
    assert uart.read(Register.FR) & Flag.RXFE


def test_without_fifo_one_character_waits(uart):
    uart.line.send(b"ab")
    assert uart.read(Register.FR) & Flag.RXFF
    assert uart.read(Register.DR) == ord("a")
    assert uart.read(Register.FR) & Flag.RXFF
    assert uart.read(Register.DR) == ord("b")
    assert uart.read(Register.FR) & Flag.RXFE


def test_interrupts_follow_mask_and_level(uart):
    uart.line.send(b"x")
    assert uart.read(Register.RIS) == Interrupt.RX
    assert uart.read(Register.MIS) == 0
    assert not uart.irq
    uart.write(Register.IMSC, Interrupt.RX)
    assert uart.irq
    assert uart.read(Register.MIS) == Interrupt.RX
    uart.read(Register.DR)
    assert not uart.irq
    uart.write(Register.IMSC, Interrupt.TX)
    uart.write(Register.DR, 65)
    assert uart.irq
    uart.write(Register.ICR, Interrupt.TX)
    assert not uart.irq


@pytest.mark.parametrize(
    ("register", "kept"),
    [
        (Register.ILPR, 0xFF),
        (Register.IBRD, 0xFFFF),
        (Register.FBRD, 0x3F),
        (Register.LCR_H, 0xFF),
        (Register.CR, 0xFFFF),
        (Register.IFLS, 0x3F),
        (Register.IMSC, 0x7FF),
        (Register.DMACR, 0x7),
    ],
)
def test_registers_keep_the_bits_they_have(uart, register, kept):
    uart.write(register, 0xFFFF_FFFF)
    assert uart.read(register) == kept
    uart.write(register, 0)
    assert uart.read(register) == 0


def test_reset_values_and_identification(uart):
    told = {Register.CR: 0x300, Register.IFLS: 0x12, Register.FR: Flag.TXFE | Flag.RXFE}
    for offset in range(0, 0xFE0, 4):
        assert uart.read(offset) == told.get(offset, 0), hex(offset)
    for _ in range(FIFO_DEPTH):
        assert uart.read(Register.DR) == 0
    ids = [uart.read(0xFE0 + 4 * i) for i in range(8)]
    assert ids == [0x11, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1]


def test_narrow_reads_and_holes(uart):
    assert uart.device.mmio_read(Register.CR + 1, 1, 0) == 0x03
    assert uart.device.mmio_read(Register.CR, 2, 0) == 0x300
    uart.device.mmio_write(Register.CR + 1, 1, 0xFF, 0)
    assert uart.read(Register.CR) == 0x300, "registers are written whole"
    assert uart.read(0x800) == 0
    assert uart.read(0x1000) == 0
    uart.write(0x800, 1)
    uart.write(Register.FR, 0)
    assert uart.read(Register.FR) == Flag.TXFE | Flag.RXFE


def test_switching_the_fifos_empties_them(uart):
    uart.line.send(b"x")
    uart.write(Register.LCR_H, FIFO_ON)
    assert uart.read(Register.FR) & Flag.RXFE


@pytest.mark.slow
def test_input_beyond_64_kib_is_dropped(uart):
    uart.line.send(b"a" * 100_000)
    count = 0
    while not uart.read(Register.FR) & Flag.RXFE:
        assert uart.read(Register.DR) == ord("a")
        count += 1
    assert count == 1 << 16


@pytest.mark.slow
def test_input_is_dropped_by_the_byte_and_only_the_newest(uart):
    uart.line.send(b"a" * 65_000)
    uart.line.send(b"b" * 1_000)
    uart.line.send(b"c")
    text = bytearray()
    while not uart.read(Register.FR) & Flag.RXFE:
        text.append(uart.read(Register.DR))
    # One was in the FIFO when the second came.
    assert text == b"a" * 65_000 + b"b" * (65_536 - 64_999)


def test_the_receive_interrupt_stays_until_the_last_character(uart):
    uart.write(Register.LCR_H, FIFO_ON)
    uart.write(Register.IMSC, Interrupt.RX)
    uart.line.send(b"ab")
    uart.read(Register.DR)
    assert uart.irq
    uart.write(Register.ICR, Interrupt.TX)
    assert uart.irq
    uart.read(Register.DR)
    assert not uart.irq
    assert uart.read(Register.RIS) == 0


@pytest.mark.parametrize(("lcr", "depth"), [(0xEF, 1), (0xFF, 16)])
def test_the_fifo_is_full_at_its_depth(uart, lcr, depth):
    uart.write(Register.LCR_H, lcr)
    for count in range(1, depth + 1):
        assert not uart.read(Register.FR) & Flag.RXFF
        uart.line.send(b"x")
        assert not uart.read(Register.FR) & Flag.RXFE
        assert uart.device.snapshot().read_count == count
    assert uart.read(Register.FR) == Flag.TXFE | Flag.RXFF


def test_other_line_settings_leave_the_fifo_alone(uart):
    uart.write(Register.LCR_H, FIFO_ON)
    uart.line.send(b"xy")
    uart.write(Register.LCR_H, FIFO_ON | 0x60)
    assert uart.read(Register.DR) == ord("x")
    uart.write(Register.LCR_H, 0x60)
    assert uart.read(Register.FR) == Flag.TXFE | Flag.RXFE


def test_a_state_goes_on_elsewhere(uart):
    uart.write(Register.LCR_H, FIFO_ON)
    uart.write(Register.IMSC, Interrupt.RX)
    uart.line.send(b"abc")
    saved = uart.device.snapshot()
    uart.read(Register.DR)
    uart.line.send(b"d" * 15)
    assert (saved.read_pos, saved.read_count, saved.fifo[:4]) == (0, 3, [*b"abc", 0]), "a copy shares nothing"
    saved.fifo[1] |= 0x500  # broken off, and of wrong parity
    other = Uart()
    other.device.restore(saved)
    assert other.irq
    assert [other.read(Register.DR), other.read(Register.RSR)] == [ord("a"), 0]
    assert [other.read(Register.DR), other.read(Register.RSR)] == [0x500 | ord("b"), 5]
    other.write(Register.RSR, 0xFF)
    assert other.read(Register.RSR) == 0
    assert other.read(Register.DR) == ord("c")
    assert not other.irq
