"""QEMU's `virt` with ARMv7 CPUs."""

from sterna.arch.arm.board import ArmBoard
from sterna.machine.board import Gic, Uart, VirtioSlots
from sterna.memory.address import Ipa

BOARD = ArmBoard(
    name="virt",
    arch="armv7",
    machine_type="virt-7.2",
    page_bits=12,
    ram_base=Ipa(0x4000_0000),
    ram_name="mach-virt.ram",
    gic=Gic(Ipa(0x0800_0000), 0x1_0000, Ipa(0x0801_0000), 0x1_0000, irqs=288),
    uarts=(Uart(Ipa(0x0900_0000), 1),),
    virtio=VirtioSlots(Ipa(0x0A00_0000), 32, spi=16),
    peripheral_base=0x0800_0000,
    psci=True,
    model="linux,dummy-virt",
    compatible=("linux,dummy-virt",),
)
