"""The PL011 UART (ARM DDI 0183G), with its section and its node."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
from functools import partial

from sterna.machine.board import Uart
from sterna.machine.devices.device import Apply, Device, Region, SectionKey, Stopped, by_name
from sterna.machine.devices.irq import LEVEL_HIGH, SPI, IrqLine
from sterna.machine.devices.node import Node
from sterna.machine.serial import SerialBackend
from sterna.memory.address import PAGE_SIZE
from sterna.stream.vmstate import (
    DeviceState,
    StreamError,
    VmStateDescription,
    array,
    i32,
    struct,
    u32,
    u64,
)

FIFO_DEPTH = 16
_BACKLOG_LIMIT = 1 << 16


class Register(IntEnum):
    """Register offsets (3.2)."""

    DR = 0x00
    RSR = 0x04
    FR = 0x18
    ILPR = 0x20
    IBRD = 0x24
    FBRD = 0x28
    LCR_H = 0x2C
    CR = 0x30
    IFLS = 0x34
    IMSC = 0x38
    RIS = 0x3C
    MIS = 0x40
    ICR = 0x44
    DMACR = 0x48
    PERIPH_ID0 = 0xFE0


class Flag(IntFlag):
    """Bits of the flag register FR (3.3.3)."""

    RXFE = 0x10
    TXFF = 0x20
    RXFF = 0x40
    TXFE = 0x80


class Interrupt(IntFlag):
    """Interrupts that this model raises, as bits of RIS (3.3.11)."""

    RX = 0x10
    TX = 0x20


_CLOCK_PHANDLE = 0x8000
_CLOCK_HZ = 24_000_000
_LCR_FIFO_ENABLE = 0x10
_RESET_CR = 0x300  # RXE and TXE
_RESET_IFLS = 0x12
_IDENTIFICATION = (0x11, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
"""PeriphID0 to 3, PCellID0 to 3 (3.3.15, 3.3.16)."""


@dataclass
class Pl011Registers:
    """All that a guest can find in a PL011; what migrates.

    :ivar fifo: the receive FIFO's storage, `FIFO_DEPTH` characters with their error bits
    :ivar read_pos: index of the oldest character in the ring that `fifo` is, also with FIFOs off
    :ivar read_count: number of characters in the FIFO
    :ivar clock_period: of the UART clock, in units of 2**-32 ns; 0 when it is not known
    """

    lcr: int = 0
    rsr: int = 0
    cr: int = _RESET_CR
    dmacr: int = 0
    imsc: int = 0
    ris: int = 0
    fifo: list[int] = field(default_factory=lambda: [0] * FIFO_DEPTH)
    ilpr: int = 0
    ibrd: int = 0
    fbrd: int = 0
    ifls: int = _RESET_IFLS
    read_pos: int = 0
    read_count: int = 0
    clock_period: int = 0

    @property
    def depth(self) -> int:
        """Characters that the receive FIFO holds: 16, or 1 when FIFOs are off."""
        return FIFO_DEPTH if self.lcr & _LCR_FIFO_ENABLE else 1

    @property
    def flags(self) -> Flag:
        """The flag register. Characters are sent at once, so the transmit FIFO is always empty."""
        flags = Flag.TXFE
        if self.read_count == 0:
            flags |= Flag.RXFE
        if self.read_count >= self.depth:
            flags |= Flag.RXFF
        return flags


_CLOCK = VmStateDescription("clock", version=0, fields=(u64("period"),))
_PL011_CLOCK = VmStateDescription("pl011/clock", version=1, fields=(struct("clk", _CLOCK),))

PL011 = VmStateDescription(
    "pl011",
    version=2,
    minimum_version=2,
    fields=(
        *(
            u32(name)
            for name in ("readbuff", "flags", "lcr", "rsr", "cr", "dmacr", "int_enabled", "int_level")
        ),
        array(u32("read_fifo"), FIFO_DEPTH),
        *(u32(name) for name in ("ilpr", "ibrd", "fbrd", "ifl")),
        *(i32(name) for name in ("read_pos", "read_count", "read_trigger")),
    ),
    subsections=(_PL011_CLOCK,),
)

_DIRECT = {
    "lcr": "lcr",
    "rsr": "rsr",
    "cr": "cr",
    "dmacr": "dmacr",
    "int_enabled": "imsc",
    "int_level": "ris",
    "ilpr": "ilpr",
    "ibrd": "ibrd",
    "fbrd": "fbrd",
    "ifl": "ifls",
    "read_pos": "read_pos",
    "read_count": "read_count",
}
"""Fields that are an attribute of the registers."""
_READ_TRIGGER = 1


class Pl011(Device):
    """A UART on a serial line. Any thread may call it.

    :ivar registers: replace it (with `restore`) to load a state

    :param slot: where the board has it
    :param number: which of the board's UARTs it is: its section's instance
    """

    descriptions = by_name(PL011)

    def __init__(self, slot: Uart, line: SerialBackend, irq: IrqLine, number: int = 0) -> None:
        self.regions = (Region(slot.base, PAGE_SIZE, self),)
        self._number = number
        self._lock = threading.RLock()
        self._line = line
        self._irq = irq
        self._backlog: deque[int] = deque()
        self.registers = Pl011Registers()

    @staticmethod
    def node_name(slot: Uart) -> str:
        """A UART's node in the device tree."""
        return f"pl011@{slot.base:x}"

    @staticmethod
    def write_node(root: Node, slot: Uart) -> None:
        """A UART's node."""
        node = root.child(Pl011.node_name(slot))
        node.strings("compatible", "arm,pl011", "arm,primecell")
        node.registers((slot.base, PAGE_SIZE))
        if root.wired:
            node.words("interrupts", SPI, slot.spi, LEVEL_HIGH)
            node.words("clocks", _CLOCK_PHANDLE, _CLOCK_PHANDLE)
            node.strings("clock-names", "uartclk", "apb_pclk")

    @staticmethod
    def write_clock(root: Node) -> None:
        """The clock that the UARTs' nodes name."""
        clock = root.child("apb-pclk")
        clock.strings("compatible", "fixed-clock")
        clock.words("#clock-cells", 0)
        clock.words("clock-frequency", _CLOCK_HZ)
        clock.strings("clock-output-names", "clk24mhz")
        clock.words("phandle", _CLOCK_PHANDLE)

    def sections(self) -> Sequence[SectionKey]:
        """Its section."""
        return [(PL011.name, self._number)]

    def save(self, stopped: Stopped) -> Sequence[DeviceState]:
        """Its section."""
        return [save_pl011(self.snapshot(), self._number)]

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """Check its section."""
        return partial(self.restore, load_pl011(found[PL011.name, self._number]))

    def snapshot(self) -> Pl011Registers:
        """A copy of the state."""
        with self._lock:
            return replace(self.registers, fifo=list(self.registers.fifo))

    def restore(self, registers: Pl011Registers) -> None:
        """Go on from a saved state."""
        with self._lock:
            self.registers = registers
            self._update()

    def receive(self, data: bytes) -> None:
        """Input from the serial line. What does not fit the FIFO waits; past 64 KiB the newest is lost."""
        with self._lock:
            self._backlog.extend(data[: _BACKLOG_LIMIT - len(self._backlog)])
            self._fill()

    def mmio_read(self, offset: int, size: int, cpu: int) -> int:
        """A register's value; 0 where there is none."""
        with self._lock:
            value = self._read(offset & ~3)
        return value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int, cpu: int) -> None:
        """Set a register; nothing happens where there is none."""
        with self._lock:
            if offset & 3 == 0:
                self._write(offset, value)

    def _read(self, offset: int) -> int:
        regs = self.registers
        match offset:
            case Register.DR:
                return self._read_data()
            case Register.RSR:
                return regs.rsr
            case Register.FR:
                return int(regs.flags)
            case Register.ILPR:
                return regs.ilpr
            case Register.IBRD:
                return regs.ibrd
            case Register.FBRD:
                return regs.fbrd
            case Register.LCR_H:
                return regs.lcr
            case Register.CR:
                return regs.cr
            case Register.IFLS:
                return regs.ifls
            case Register.IMSC:
                return regs.imsc
            case Register.RIS:
                return regs.ris
            case Register.MIS:
                return regs.ris & regs.imsc
            case Register.DMACR:
                return regs.dmacr
        if Register.PERIPH_ID0 <= offset < Register.PERIPH_ID0 + 4 * len(_IDENTIFICATION):
            return _IDENTIFICATION[(offset - Register.PERIPH_ID0) >> 2]
        return 0

    def _write(self, offset: int, value: int) -> None:
        regs = self.registers
        match offset:
            case Register.DR:
                self._line.write(bytes((value & 0xFF,)))
                regs.ris |= Interrupt.TX
            case Register.RSR:
                regs.rsr = 0
            case Register.ILPR:
                regs.ilpr = value & 0xFF
            case Register.IBRD:
                regs.ibrd = value & 0xFFFF
            case Register.FBRD:
                regs.fbrd = value & 0x3F
            case Register.LCR_H:
                # Switching the FIFOs on or off empties them (3.3.7).
                if (regs.lcr ^ value) & _LCR_FIFO_ENABLE:
                    regs.read_pos = regs.read_count = 0
                regs.lcr = value & 0xFF
                self._fill()
            case Register.CR:
                regs.cr = value & 0xFFFF
            case Register.IFLS:
                regs.ifls = value & 0x3F
            case Register.IMSC:
                regs.imsc = value & 0x7FF
            case Register.ICR:
                regs.ris &= ~value
            case Register.DMACR:
                regs.dmacr = value & 0x7
        self._update()

    def _read_data(self) -> int:
        regs = self.registers
        character = regs.fifo[regs.read_pos]
        if regs.read_count:
            regs.read_pos = (regs.read_pos + 1) % FIFO_DEPTH
            regs.read_count -= 1
            if regs.read_count == 0:
                regs.ris &= ~Interrupt.RX
        regs.rsr = character >> 8
        self._fill()
        self._update()
        return character

    def _fill(self) -> None:
        """Move waiting input into the FIFO."""
        regs = self.registers
        while self._backlog and regs.read_count < regs.depth:
            regs.fifo[(regs.read_pos + regs.read_count) % FIFO_DEPTH] = self._backlog.popleft()
            regs.read_count += 1
            regs.ris |= Interrupt.RX
        self._update()

    def _update(self) -> None:
        self._irq(bool(self.registers.ris & self.registers.imsc))


def save_pl011(registers: Pl011Registers, instance_id: int) -> DeviceState:
    """The section of a UART."""
    fields = {name: getattr(registers, attribute) for name, attribute in _DIRECT.items()}
    fields |= {
        "readbuff": 0,
        "flags": int(registers.flags),
        "read_fifo": list(registers.fifo),
        "read_trigger": _READ_TRIGGER,
    }
    clock = DeviceState(
        _PL011_CLOCK.name, 0, _PL011_CLOCK.version, {"clk": {"period": registers.clock_period}}
    )
    return DeviceState(PL011.name, instance_id, PL011.version, fields, (clock,))


def load_pl011(state: DeviceState) -> Pl011Registers:
    """A UART's registers.

    :raise StreamError: When the position or count of the receive FIFO is beyond its depth.
    """
    fields = state.fields
    registers = Pl011Registers(fifo=list(fields["read_fifo"]))
    for name, attribute in _DIRECT.items():
        setattr(registers, attribute, fields[name])
    for name, limit in (("read_pos", FIFO_DEPTH - 1), ("read_count", registers.depth)):
        if not 0 <= fields[name] <= limit:
            raise StreamError(f"{fields[name]} is beyond {limit}", state.name).inside(name)
    for subsection in state.subsections:
        registers.clock_period = subsection.fields["clk"]["period"]
    return registers
