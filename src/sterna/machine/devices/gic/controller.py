"""The interrupt controller GICv2, without the security extensions (ARM IHI 0048B).

One `Gic` is the distributor and the CPU interfaces of all CPUs; `GicDistributor` and `GicCpuInterface` are its two
faces in the guest's address space. Guests here poll: an interrupt that reaches a CPU ends its `wfi` and is found by reading
IAR; no exception is taken. The level of the virtual timer's line is known to the vCPU alone, so the GIC tells each vCPU
whether an expiry would reach it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from sterna.machine import board
from sterna.machine.board import GIC_SPI_BASE, VIRTUAL_TIMER_IRQ
from sterna.machine.devices.device import Apply, Device, Region, SectionKey, Stopped, by_name
from sterna.machine.devices.gic.registers import (
    ALL_CPUS,
    APR_WORDS,
    IDLE_PRIORITY,
    MINIMUM_ABPR,
    SGIS,
    SPURIOUS,
    CpuInterface,
    Distributor,
    GicRegisters,
)
from sterna.machine.devices.gic.section import ARM_GIC, load_gic, save_gic
from sterna.machine.devices.node import Node
from sterna.stream.vmstate import DeviceState

GIC_PHANDLE = 0x8001
_DISTRIBUTOR_IIDR = 0x0000_043B
_CPU_INTERFACE_IIDR = 0x0002_043B
# GIC-400 TRM (ARM DDI 0471B), 3.3.8 on: peripheral ids 4-7, 0-3, component ids 0-3.
_IDENTIFICATION = (0x04, 0x00, 0x00, 0x00, 0x90, 0xB4, 0x2B, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_GROUP_ENABLES = 0x3
_CPU_CTLR_MASK = 0x1F


class InterruptTarget(Protocol):
    """A CPU as the GIC sees it."""

    def set_interrupt(self, level: bool) -> None:
        """Whether an interrupt is signalled to the CPU. Called when that changes."""
        ...

    def set_timer_wakes(self, enabled: bool) -> None:
        """Whether the virtual timer's interrupt would reach the CPU."""
        ...


class Gic(Device):
    """A GICv2 for up to four CPUs. Any thread may call it.

    :ivar registers: replace it with `restore`

    :param slot: where the board has it
    """

    descriptions = by_name(ARM_GIC)

    def __init__(self, slot: board.Gic, targets: Sequence[InterruptTarget]) -> None:
        self.regions = (
            Region(slot.distributor, slot.distributor_bytes, GicDistributor(self)),
            Region(slot.cpu_interface, slot.cpu_interface_bytes, GicCpuInterface(self)),
        )
        self._lock = threading.RLock()
        self._irqs = slot.irqs
        self._targets = tuple(targets)
        self._cpus = len(self._targets)
        self._timer_wakes: list[bool | None] = [None] * self._cpus
        self._signalled = [False] * self._cpus
        self.registers = GicRegisters.reset(self._cpus)
        self._update()

    @staticmethod
    def write_node(root: Node, slot: board.Gic) -> None:
        """Its node in the device tree."""
        node = root.child(f"intc@{slot.distributor:x}")
        node.strings("compatible", "arm,cortex-a15-gic")
        node.words("#interrupt-cells", 3)
        node.flag("interrupt-controller")
        node.registers(
            (slot.distributor, slot.distributor_bytes), (slot.cpu_interface, slot.cpu_interface_bytes)
        )
        node.words("phandle", GIC_PHANDLE)

    def save(self, stopped: Stopped) -> Sequence[DeviceState]:
        """Its section, with the CPUs' timer lines as the CPUs have said them."""
        return [save_gic(*self.snapshot(stopped.timer_lines))]

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """Check its section."""
        return partial(self.restore, load_gic(found[ARM_GIC.name, 0], self._cpus))

    def restore(self, registers: GicRegisters) -> None:
        """Go on from a saved state. The lines of private interrupts are not taken from it: they belong to the vCPUs."""
        with self._lock:
            self.registers = registers
            for irq in registers.irqs[:GIC_SPI_BASE]:
                irq.level = 0
            self._update()

    def snapshot(self, timer_lines: Sequence[bool]) -> tuple[GicRegisters, list[int]]:
        """A copy of the state, and `pending`.

        :param timer_lines: whether the virtual timer of each CPU asserts its interrupt; the copy has it as the line's level
        """
        with self._timers(timer_lines):
            return self.registers.copy(), self._pending_of_all()

    def pending(self, timer_lines: Sequence[bool]) -> list[int]:
        """The highest pending interrupt of each CPU, or `SPURIOUS`.

        :param timer_lines: as `snapshot`
        """
        with self._timers(timer_lines):
            return self._pending_of_all()

    @contextmanager
    def _timers(self, lines: Sequence[bool]) -> Iterator[None]:
        with self._lock:
            timer = self.registers.irqs[VIRTUAL_TIMER_IRQ]
            timer.level = sum(1 << cpu for cpu, level in enumerate(lines) if level)
            try:
                yield
            finally:
                timer.level = 0

    def _pending_of_all(self) -> list[int]:
        return [self._highest_pending(cpu) for cpu in range(self._cpus)]

    def line(self, irq: int) -> Callable[[bool], None]:
        """The input of shared interrupt number `irq`."""
        assert GIC_SPI_BASE <= irq < self._irqs

        def set_level(level: bool) -> None:
            with self._lock:
                state = self.registers.irqs[irq]
                if bool(state.level) == level:
                    return
                state.level = ALL_CPUS if level else 0
                if level and state.edge_trigger:
                    state.pending = ALL_CPUS
                self._update()

        return set_level

    def read_distributor(self, offset: int, size: int, cpu: int) -> int:
        """What CPU `cpu` reads: registers are byte accessible, and the first 32 interrupts are the CPU's own."""
        with self._lock:
            return int.from_bytes(bytes(self._read_byte(offset + i, cpu) for i in range(size)), "little")

    def write_distributor(self, offset: int, size: int, value: int, cpu: int) -> None:
        """CPU `cpu` writes a register or a part of one."""
        with self._lock:
            if offset & ~3 == Distributor.SGIR:
                if size == 4:
                    self._send_sgi(value, cpu)
            else:
                for i, byte in enumerate((value & (1 << 8 * size) - 1).to_bytes(size, "little")):
                    self._write_byte(offset + i, byte, cpu)
            self._update()

    def read_cpu_interface(self, offset: int, cpu: int) -> int:
        """What CPU `cpu` reads from its own interface; reading IAR acknowledges."""
        registers = self.registers
        with self._lock:
            match offset:
                case CpuInterface.CTLR:
                    return registers.cpu_ctlr[cpu]
                case CpuInterface.PMR:
                    return registers.priority_mask[cpu]
                case CpuInterface.BPR:
                    return registers.bpr[cpu]
                case CpuInterface.ABPR:
                    return registers.abpr[cpu]
                case CpuInterface.IAR:
                    return self._acknowledge(cpu)
                case CpuInterface.RPR:
                    return min(registers.running_priority[cpu], 0xFF)
                case CpuInterface.HPPIR:
                    return self._with_source(self._highest_pending(cpu), cpu)
                case CpuInterface.IIDR:
                    return _CPU_INTERFACE_IIDR
            if CpuInterface.APR <= offset < CpuInterface.APR + 4 * APR_WORDS:
                return registers.apr[(offset - CpuInterface.APR) >> 2][cpu]
            return 0

    def write_cpu_interface(self, offset: int, value: int, cpu: int) -> None:
        """CPU `cpu` writes to its own interface."""
        registers = self.registers
        with self._lock:
            match offset:
                case CpuInterface.CTLR:
                    registers.cpu_ctlr[cpu] = value & _CPU_CTLR_MASK
                case CpuInterface.PMR:
                    registers.priority_mask[cpu] = value & 0xFF
                case CpuInterface.BPR:
                    registers.bpr[cpu] = value & 0x7
                case CpuInterface.ABPR:
                    registers.abpr[cpu] = max(value & 0x7, MINIMUM_ABPR)
                case CpuInterface.EOIR:
                    self._end(value & 0x3FF, cpu)
            self._update()

    def _private(self, irq: int) -> bool:
        return irq < GIC_SPI_BASE

    def _mask(self, irq: int, cpu: int) -> int:
        return 1 << cpu if self._private(irq) else ALL_CPUS

    def _priority(self, irq: int, cpu: int) -> int:
        registers = self.registers
        return (
            registers.private_priority[irq][cpu]
            if self._private(irq)
            else registers.priority[irq - GIC_SPI_BASE]
        )

    def _group_bit(self, irq: int, cpu: int) -> int:
        return 1 if self.registers.irqs[irq].group & self._mask(irq, cpu) else 0

    def _pending(self, irq: int, cpu: int) -> bool:
        state, mask = self.registers.irqs[irq], self._mask(irq, cpu)
        return bool(state.pending & mask or (not state.edge_trigger and state.level & mask))

    def _targets_cpu(self, irq: int, cpu: int) -> bool:
        # With one CPU, the target registers read as zero and it gets all interrupts (4.3.12).
        return self._private(irq) or self._cpus == 1 or bool(self.registers.target[irq] & 1 << cpu)

    def _forwards(self, irq: int, cpu: int) -> bool:
        """Whether an interrupt, were it pending, would reach a CPU that is idle."""
        registers = self.registers
        group = 1 << self._group_bit(irq, cpu)
        return bool(
            registers.ctlr & group
            and registers.cpu_ctlr[cpu] & group
            and registers.irqs[irq].enabled & self._mask(irq, cpu)
            and self._targets_cpu(irq, cpu)
            and self._priority(irq, cpu) < registers.priority_mask[cpu]
        )

    def _highest_pending(self, cpu: int) -> int:
        registers = self.registers
        if not registers.ctlr & _GROUP_ENABLES or not registers.cpu_ctlr[cpu] & _GROUP_ENABLES:
            return SPURIOUS
        best, best_priority = SPURIOUS, IDLE_PRIORITY
        for irq in range(self._irqs):
            state = registers.irqs[irq]
            if not (state.pending or state.level) or state.active & self._mask(irq, cpu):
                continue
            priority = self._priority(irq, cpu)
            if priority < best_priority and self._pending(irq, cpu) and self._forwards(irq, cpu):
                best, best_priority = irq, priority
        return best

    def _signalled_interrupt(self, cpu: int) -> int:
        """The highest pending interrupt where its priority is enough to preempt what is active (3.3.1), or `SPURIOUS`."""
        irq = self._highest_pending(cpu)
        enough = irq != SPURIOUS and self._preemption_level(irq, cpu) < self.registers.running_priority[cpu]
        return irq if enough else SPURIOUS

    def _preemption_level(self, irq: int, cpu: int) -> int:
        """The part of a priority that decides about preemption (3.3.3)."""
        registers = self.registers
        point = registers.bpr[cpu]
        if self._group_bit(irq, cpu) and not registers.cpu_ctlr[cpu] & 0x10:
            point = registers.abpr[cpu] - 1
        return self._priority(irq, cpu) & 0xFF & (~0 << point + 1)

    def _with_source(self, irq: int, cpu: int) -> int:
        """An IAR value: of an SGI, the sender stands in bits 12:10."""
        if irq >= SGIS:
            return irq
        sources = self.registers.sgi_sources[irq][cpu]
        return irq | ((sources & -sources).bit_length() - 1 if sources else 0) << 10

    def _acknowledge(self, cpu: int) -> int:
        registers = self.registers
        irq = self._signalled_interrupt(cpu)
        if irq == SPURIOUS:
            return SPURIOUS
        value = self._with_source(irq, cpu)
        state, mask = registers.irqs[irq], self._mask(irq, cpu)
        if irq < SGIS:
            registers.sgi_sources[irq][cpu] &= ~(1 << (value >> 10))
        if irq >= SGIS or not registers.sgi_sources[irq][cpu]:
            state.pending &= ~mask
        state.active |= mask
        level = self._preemption_level(irq, cpu)
        registers.apr[level >> 6][cpu] |= 1 << (level >> 1 & 31)
        registers.running_priority[cpu] = level
        self._update()
        return value

    def _end(self, irq: int, cpu: int) -> None:
        registers = self.registers
        if irq >= self._irqs or not registers.irqs[irq].active & self._mask(irq, cpu):
            return
        registers.irqs[irq].active &= ~self._mask(irq, cpu)
        registers.running_priority[cpu] = IDLE_PRIORITY
        dropped = False
        for word in range(APR_WORDS):
            bits = registers.apr[word][cpu]
            if bits and not dropped:
                registers.apr[word][cpu] = bits = bits & bits - 1
                dropped = True
            if bits and registers.running_priority[cpu] == IDLE_PRIORITY:
                registers.running_priority[cpu] = (32 * word + (bits & -bits).bit_length() - 1) << 1

    def _send_sgi(self, value: int, cpu: int) -> None:
        """GICD_SGIR (4.3.15): target filter in 25:24, target list in 23:16, number in 3:0."""
        everyone = (1 << self._cpus) - 1
        filters = {0: value >> 16 & everyone, 1: everyone & ~(1 << cpu), 2: 1 << cpu}
        self._pend_sgi(value & 0xF, filters.get(value >> 24 & 3, 0), 1 << cpu)

    def _pend_sgi(self, sgi: int, targets: int, sources: int) -> None:
        self.registers.irqs[sgi].pending |= targets
        for target in range(self._cpus):
            if targets & 1 << target:
                self.registers.sgi_sources[sgi][target] |= sources

    def _update(self) -> None:
        """Tell the CPUs what changed for them."""
        for cpu, target in enumerate(self._targets):
            timer = self._forwards(VIRTUAL_TIMER_IRQ, cpu)
            if timer != self._timer_wakes[cpu]:
                self._timer_wakes[cpu] = timer
                target.set_timer_wakes(timer)
            signalled = self._signalled_interrupt(cpu) != SPURIOUS
            if signalled != self._signalled[cpu]:
                self._signalled[cpu] = signalled
                target.set_interrupt(signalled)

    def _read_byte(self, offset: int, cpu: int) -> int:
        match _register_at(offset):
            case Distributor.CTLR:
                return self.registers.ctlr if offset == 0 else 0
            case Distributor.TYPER:
                return ((self._irqs // 32 - 1) | (self._cpus - 1) << 5) >> 8 * (offset & 3) & 0xFF
            case Distributor.IIDR if offset < Distributor.IIDR + 4:
                return _DISTRIBUTOR_IIDR >> 8 * (offset & 3) & 0xFF
            case Distributor.IGROUPR as base:
                return self._collect(offset - base, lambda irq: bool(self._group_bit(irq, cpu)))
            case Distributor.ISENABLER | Distributor.ICENABLER as base:
                return self._collect(
                    offset - base, lambda irq: bool(self.registers.irqs[irq].enabled & self._mask(irq, cpu))
                )
            case Distributor.ISPENDR | Distributor.ICPENDR as base:
                return self._collect(offset - base, lambda irq: self._pending(irq, cpu))
            case Distributor.ISACTIVER | Distributor.ICACTIVER as base:
                return self._collect(
                    offset - base, lambda irq: bool(self.registers.irqs[irq].active & self._mask(irq, cpu))
                )
            case Distributor.IPRIORITYR as base if offset - base < self._irqs:
                return self._priority(offset - base, cpu)
            case Distributor.ITARGETSR as base if offset - base < self._irqs and self._cpus > 1:
                return 1 << cpu if self._private(offset - base) else self.registers.target[offset - base]
            case Distributor.ICFGR as base:
                first = 4 * (offset - base)
                fields = (self.registers.irqs[irq] for irq in range(first, min(first + 4, self._irqs)))
                return sum((irq.model | irq.edge_trigger << 1) << 2 * i for i, irq in enumerate(fields))
            case Distributor.CPENDSGIR | Distributor.SPENDSGIR as base:
                return self.registers.sgi_sources[offset - base][cpu]
            case Distributor.IDENTIFICATION as base if offset & 3 == 0:
                return _IDENTIFICATION[(offset - base) >> 2]
        return 0

    def _write_byte(self, offset: int, value: int, cpu: int) -> None:
        irqs = self.registers.irqs
        match _register_at(offset):
            case Distributor.CTLR if offset == 0:
                self.registers.ctlr = value & _GROUP_ENABLES
            case Distributor.IGROUPR as base:
                for irq, mask, bit in self._bits(offset - base, 0xFF, cpu):
                    on = value >> bit & 1
                    irqs[irq].group = irqs[irq].group | mask if on else irqs[irq].group & ~mask
            case Distributor.ISENABLER as base:
                for irq, mask, _ in self._bits(offset - base, value, cpu):
                    irqs[irq].enabled |= mask
            case Distributor.ICENABLER as base:
                for irq, mask, _ in self._bits(offset - base, value, cpu, first=SGIS):
                    irqs[irq].enabled &= ~mask
            case Distributor.ISPENDR as base:
                for irq, mask, _ in self._bits(offset - base, value, cpu, first=SGIS):
                    irqs[irq].pending |= mask
            case Distributor.ICPENDR as base:
                for irq, mask, _ in self._bits(offset - base, value, cpu, first=SGIS):
                    irqs[irq].pending &= ~mask
            case Distributor.ISACTIVER as base:
                for irq, mask, _ in self._bits(offset - base, value, cpu):
                    irqs[irq].active |= mask
            case Distributor.ICACTIVER as base:
                for irq, mask, _ in self._bits(offset - base, value, cpu):
                    irqs[irq].active &= ~mask
            case Distributor.IPRIORITYR as base if offset - base < self._irqs:
                if self._private(offset - base):
                    self.registers.private_priority[offset - base][cpu] = value
                else:
                    self.registers.priority[offset - base - GIC_SPI_BASE] = value
            case Distributor.ITARGETSR as base if GIC_SPI_BASE <= offset - base < self._irqs:
                if self._cpus > 1:
                    self.registers.target[offset - base] = value & (1 << self._cpus) - 1
            case Distributor.ICFGR as base:
                first = 4 * (offset - base)
                for irq in range(max(first, SGIS), min(first + 4, self._irqs)):
                    irqs[irq].edge_trigger = bool(value >> 2 * (irq - first) & 2)
            case Distributor.CPENDSGIR as base:
                sources = self.registers.sgi_sources[offset - base]
                sources[cpu] &= ~value
                if not sources[cpu]:
                    irqs[offset - base].pending &= ~(1 << cpu)
            case Distributor.SPENDSGIR as base if value:
                self._pend_sgi(offset - base, 1 << cpu, value & (1 << self._cpus) - 1)

    def _collect(self, byte: int, bit: Callable[[int], bool]) -> int:
        """A byte of a bit-per-interrupt register."""
        return sum(bit(irq) << irq - 8 * byte for irq in range(8 * byte, min(8 * byte + 8, self._irqs)))

    def _bits(self, byte: int, value: int, cpu: int, first: int = 0) -> list[tuple[int, int, int]]:
        """(interrupt, its CPU mask, bit number) of each bit set in a byte of a bit-per-interrupt register."""
        return [
            (8 * byte + bit, self._mask(8 * byte + bit, cpu), bit)
            for bit in range(8)
            if value >> bit & 1 and first <= 8 * byte + bit < self._irqs
        ]


_BASES = sorted(Distributor, reverse=True)


def _register_at(offset: int) -> Distributor:
    """The register, or array of registers, that has a byte at this offset."""
    return next((base for base in _BASES if base <= offset), Distributor.RESERVED)


class GicDistributor:
    """The distributor's page in the guest's address space."""

    def __init__(self, gic: Gic) -> None:
        self._gic = gic

    def mmio_read(self, offset: int, size: int, cpu: int) -> int:
        """A register or a part of one."""
        return self._gic.read_distributor(offset, size, cpu) if offset + size <= 0x1000 else 0

    def mmio_write(self, offset: int, size: int, value: int, cpu: int) -> None:
        """Set a register or a part of one."""
        if offset + size <= 0x1000:
            self._gic.write_distributor(offset, size, value, cpu)


class GicCpuInterface:
    """The CPU interface's pages in the guest's address space: each CPU sees its own."""

    def __init__(self, gic: Gic) -> None:
        self._gic = gic

    def mmio_read(self, offset: int, size: int, cpu: int) -> int:
        """A register. Only a read of a whole IAR acknowledges."""
        if offset & 3 or size != 4:
            return 0
        return self._gic.read_cpu_interface(offset, cpu)

    def mmio_write(self, offset: int, size: int, value: int, cpu: int) -> None:
        """Set a register; parts of one cannot be written."""
        if not offset & 3 and size == 4:
            self._gic.write_cpu_interface(offset, value, cpu)
