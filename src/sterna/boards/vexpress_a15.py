"""QEMU's `vexpress-a15`."""

from sterna.arch.arm.board import ArmBoard
from sterna.machine.board import Gic, Uart, VirtioSlots
from sterna.memory.address import Ipa

BOARD = ArmBoard(
    name="vexpress-a15",
    arch="armv7",
    machine_type="vexpress-a15",
    page_bits=None,
    ram_base=Ipa(0x8000_0000),
    ram_name="vexpress.highmem",
    gic=Gic(Ipa(0x2C00_1000), 0x1000, Ipa(0x2C00_2000), 0x2000, irqs=160),
    uarts=tuple(Uart(Ipa(0x1C09_0000 + 0x1_0000 * i), 5 + i) for i in range(4)),
    virtio=VirtioSlots(Ipa(0x1C13_0000), 4, spi=40),
    peripheral_base=0x2C00_0000,
    psci=False,
    model="V2P-CA15",
    compatible=("arm,vexpress,v2p-ca15", "arm,vexpress"),
)
