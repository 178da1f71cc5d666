"""The device tree that tells a guest its arguments and its hardware (Devicetree Specification 0.4).

Its shape is that of the trees QEMU makes for these boards, as far as the devices are there. Each device writes its own node.
"""

import fdt

from sterna.machine.board import DEVICE_TREE_ROOM
from sterna.machine.config import MachineConfig
from sterna.machine.devices.node import Node
from sterna.machine.devices.pl011 import Pl011
from sterna.machine.platform import platform_of
from sterna.machine.virtio.bus import VirtioBus

_DTB_VERSION = 17


def build(config: MachineConfig) -> bytes:
    """The flattened tree for a machine, smaller than `DEVICE_TREE_ROOM`."""
    board, platform = config.board, platform_of(config.board)
    tree = fdt.FDT()
    root = Node(tree.root, wired=platform.interrupt_parent is not None)
    root.strings("model", board.model)
    root.strings("compatible", *board.compatible)
    if platform.interrupt_parent is not None:
        root.words("interrupt-parent", platform.interrupt_parent)
    root.words("#address-cells", 2)
    root.words("#size-cells", 2)
    chosen = root.child("chosen")
    chosen.strings("bootargs", config.append)
    chosen.strings("stdout-path", f"/{Pl011.node_name(board.uarts[0])}")
    memory = root.child(f"memory@{board.ram_base:x}")
    memory.strings("device_type", "memory")
    memory.registers((board.ram_base, config.memory_bytes))
    platform.write_nodes(root, board, config.smp, config.cpus[config.cpu])
    VirtioBus.write_nodes(root, board.virtio, len(config.nics) + len(config.devices))
    for uart in board.uarts:
        Pl011.write_node(root, uart)
    blob = bytes(tree.to_dtb(_DTB_VERSION))
    assert len(blob) <= DEVICE_TREE_ROOM
    return blob
