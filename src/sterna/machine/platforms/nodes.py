"""Nodes of the device tree that several architectures have."""

from sterna.machine.board import VIRTUAL_TIMER_IRQ, ArmBoard
from sterna.machine.devices.gic.controller import Gic
from sterna.machine.devices.irq import LEVEL_HIGH, PPI
from sterna.machine.devices.node import Node
from sterna.machine.devices.pl011 import Pl011

_CPU_MASK_SHIFT = 8
_PPI_BASE = 16
# PSCI 0.1 had no fixed numbers: older guests take them from the tree (ARM DEN 0022, 5.1 has those of 0.2).
_PSCI_NUMBERS = {
    "cpu_suspend": 0x8400_0001,
    "cpu_off": 0x8400_0002,
    "cpu_on": 0x8400_0003,
    "migrate": 0x8400_0005,
}
# Secure, non-secure physical, virtual, hypervisor timer (the order of the binding arm,arch_timer).
_TIMER_IRQS = (29, 30, VIRTUAL_TIMER_IRQ, 26)


def write_cpus(root: Node, smp: int, compatible: str, *, psci: bool = False) -> None:
    """The CPUs."""
    cpus = root.child("cpus")
    cpus.words("#address-cells", 1)
    cpus.words("#size-cells", 0)
    for index in range(smp):
        cpu = cpus.child(f"cpu@{index}")
        cpu.strings("device_type", "cpu")
        cpu.strings("compatible", compatible)
        if psci:
            cpu.strings("enable-method", "psci")
        cpu.words("reg", index)


def write_arm(root: Node, board: ArmBoard, smp: int, *, cpu: str, timer: str) -> None:
    """CPUs and what goes with them, by what the CPUs and their timers are compatible with."""
    write_cpus(root, smp, cpu, psci=board.psci)
    if board.psci:
        psci = root.child("psci")
        psci.strings("compatible", "arm,psci-1.0", "arm,psci-0.2", "arm,psci")
        psci.strings("method", "hvc")
        for name, number in _PSCI_NUMBERS.items():
            psci.words(name, number)
    _write_timer(root, smp, timer)
    Pl011.write_clock(root)
    Gic.write_node(root, board.gic)


def _write_timer(root: Node, smp: int, compatible: str) -> None:
    timer = root.child("timer")
    timer.strings("compatible", compatible)
    timer.flag("always-on")
    flags = ((1 << smp) - 1) << _CPU_MASK_SHIFT | LEVEL_HIGH
    timer.words("interrupts", *(cell for irq in _TIMER_IRQS for cell in (PPI, irq - _PPI_BASE, flags)))
