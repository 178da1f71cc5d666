"""A board of our own with x86_64 CPUs: as little as a guest of KVM needs."""

from sterna.arch.x86_64.board import X86Board
from sterna.machine.board import Uart, VirtioSlots
from sterna.memory.address import Ipa

BOARD = X86Board(
    name="pc-min",
    arch="x86_64",
    machine_type="pc-min",
    page_bits=12,
    ram_base=Ipa(0x4000_0000),
    ram_name="pc-min.ram",
    uarts=(Uart(Ipa(0x0900_0000), 1),),
    virtio=VirtioSlots(Ipa(0x0A00_0000), 32, spi=16),
    model="pc-min",
    compatible=("sterna,pc-min",),
    # Above are the pages that KVM keeps for itself.
    ram_end=0xF000_0000,
    sleep_timer=Ipa(0x0901_0000),
)
