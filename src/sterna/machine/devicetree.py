"""The device tree that tells a guest its arguments and its hardware (Devicetree Specification 0.4).

Its shape is that of the trees QEMU makes for these boards, as far as the devices are there.
"""

import fdt

from sterna.hypervisor.accelerator import Isa
from sterna.machine.board import DEVICE_TREE_ROOM, TRANSPORT_BYTES, ArmBoard, Board
from sterna.machine.config import MachineConfig

_GIC_PHANDLE = 0x8001
_CLOCK_PHANDLE = 0x8000
_SPI, _PPI = 0, 1
_EDGE_RISING, _LEVEL_HIGH = 1, 4
_CPU_MASK_SHIFT = 8
_DTB_VERSION = 17
_CPU_COMPATIBLE = {Isa.ARMV7: "arm,cortex-a15", Isa.ARM64: "arm,armv8", Isa.X86_64: "x86,x86-64"}
_TIMER_COMPATIBLE = {Isa.ARMV7: "arm,armv7-timer", Isa.ARM64: "arm,armv8-timer"}
_CLOCK_HZ = 24_000_000
_PPI_BASE = 16
# PSCI 0.1 had no fixed numbers: older guests take them from the tree (ARM DEN 0022, 5.1 has those of 0.2).
_PSCI_NUMBERS = {
    "cpu_suspend": 0x8400_0001,
    "cpu_off": 0x8400_0002,
    "cpu_on": 0x8400_0003,
    "migrate": 0x8400_0005,
}
# Secure, non-secure physical, virtual, hypervisor timer (the order of the binding arm,arch_timer).
_TIMER_IRQS = (29, 30, 27, 26)


def build(config: MachineConfig) -> bytes:
    """The flattened tree for a machine, smaller than `DEVICE_TREE_ROOM`."""
    board = config.board
    tree = fdt.FDT()
    root = tree.root
    _strings(root, "model", board.model)
    _strings(root, "compatible", *board.compatible)
    if isinstance(board, ArmBoard):
        _words(root, "interrupt-parent", _GIC_PHANDLE)
    _words(root, "#address-cells", 2)
    _words(root, "#size-cells", 2)
    console = f"/pl011@{board.uarts[0].base:x}"
    chosen = _node(root, "chosen")
    if config.append:
        _strings(chosen, "bootargs", config.append)
    else:
        chosen.append(fdt.PropBytes("bootargs", data=b"\0"))  # the library refuses an empty string
    _strings(chosen, "stdout-path", console)
    memory = _node(root, f"memory@{board.ram_base:x}")
    _strings(memory, "device_type", "memory")
    _region(memory, (board.ram_base, config.memory_bytes))
    _cpus(root, board, config.smp)
    if isinstance(board, ArmBoard):
        _arm(root, board, config.smp)
    for number in range(len(config.nics)):
        slot = board.virtio.slot_of(number)
        node = _node(root, f"virtio_mmio@{board.virtio.address(slot):x}")
        _strings(node, "compatible", "virtio,mmio")
        _region(node, (board.virtio.address(slot), TRANSPORT_BYTES))
        if isinstance(board, ArmBoard):
            _words(node, "interrupts", _SPI, board.virtio.spi + slot, _EDGE_RISING)
            node.append(fdt.Property("dma-coherent"))
    for uart in board.uarts:
        node = _node(root, f"pl011@{uart.base:x}")
        _strings(node, "compatible", "arm,pl011", "arm,primecell")
        _region(node, (uart.base, 0x1000))
        if isinstance(board, ArmBoard):
            _words(node, "interrupts", _SPI, uart.spi, _LEVEL_HIGH)
            _words(node, "clocks", _CLOCK_PHANDLE, _CLOCK_PHANDLE)
            _strings(node, "clock-names", "uartclk", "apb_pclk")
    blob = bytes(tree.to_dtb(_DTB_VERSION))
    assert len(blob) <= DEVICE_TREE_ROOM
    return blob


def _arm(root: fdt.Node, board: ArmBoard, smp: int) -> None:
    """What an ARM board has besides its CPUs and UARTs."""
    if board.psci:
        psci = _node(root, "psci")
        _strings(psci, "compatible", "arm,psci-1.0", "arm,psci-0.2", "arm,psci")
        _strings(psci, "method", "hvc")
        for name, number in _PSCI_NUMBERS.items():
            _words(psci, name, number)
    _timer(root, board, smp)
    _clock(root)
    _gic(root, board)


def _cpus(root: fdt.Node, board: Board, smp: int) -> None:
    cpus = _node(root, "cpus")
    _words(cpus, "#address-cells", 1)
    _words(cpus, "#size-cells", 0)
    for index in range(smp):
        cpu = _node(cpus, f"cpu@{index}")
        _strings(cpu, "device_type", "cpu")
        _strings(cpu, "compatible", _CPU_COMPATIBLE[board.isa])
        if isinstance(board, ArmBoard) and board.psci:
            _strings(cpu, "enable-method", "psci")
        _words(cpu, "reg", index)


def _timer(root: fdt.Node, board: ArmBoard, smp: int) -> None:
    timer = _node(root, "timer")
    _strings(timer, "compatible", _TIMER_COMPATIBLE[board.isa])
    timer.append(fdt.Property("always-on"))
    flags = ((1 << smp) - 1) << _CPU_MASK_SHIFT | _LEVEL_HIGH
    _words(timer, "interrupts", *(word for irq in _TIMER_IRQS for word in (_PPI, irq - _PPI_BASE, flags)))


def _clock(root: fdt.Node) -> None:
    clock = _node(root, "apb-pclk")
    _strings(clock, "compatible", "fixed-clock")
    _words(clock, "#clock-cells", 0)
    _words(clock, "clock-frequency", _CLOCK_HZ)
    _strings(clock, "clock-output-names", "clk24mhz")
    _words(clock, "phandle", _CLOCK_PHANDLE)


def _gic(root: fdt.Node, board: ArmBoard) -> None:
    gic = _node(root, f"intc@{board.gic.distributor:x}")
    _strings(gic, "compatible", "arm,cortex-a15-gic")
    _words(gic, "#interrupt-cells", 3)
    gic.append(fdt.Property("interrupt-controller"))
    _region(
        gic,
        (board.gic.distributor, board.gic.distributor_bytes),
        (board.gic.cpu_interface, board.gic.cpu_interface_bytes),
    )
    _words(gic, "phandle", _GIC_PHANDLE)


def _node(parent: fdt.Node, name: str) -> fdt.Node:
    node = fdt.Node(name)
    parent.append(node)
    return node


def _strings(node: fdt.Node, name: str, *values: str) -> None:
    node.append(fdt.PropStrings(name, *values))


def _words(node: fdt.Node, name: str, *values: int) -> None:
    node.append(fdt.PropWords(name, *values))


def _region(node: fdt.Node, *regions: tuple[int, int]) -> None:
    words = [half for region in regions for number in region for half in (number >> 32, number & 0xFFFF_FFFF)]
    _words(node, "reg", *words)
