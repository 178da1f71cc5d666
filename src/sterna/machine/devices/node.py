"""A node of the device tree, as a device writes it (Devicetree Specification 0.4)."""

import fdt


class Node:
    """A node in the making.

    :ivar wired: the board has an interrupt controller that the tree names. Nodes then have what the bindings of ARM's devices
        ask for besides their registers: interrupts, clocks
    """

    def __init__(self, node: fdt.Node, *, wired: bool) -> None:
        self._node = node
        self.wired = wired

    def child(self, name: str) -> "Node":
        """A new node within this one."""
        node = fdt.Node(name)
        self._node.append(node)
        return Node(node, wired=self.wired)

    def strings(self, name: str, *values: str) -> None:
        """A property of texts."""
        # The library refuses an empty one.
        text = fdt.PropStrings(name, *values) if all(values) else fdt.PropBytes(name, data=b"\0")
        self._node.append(text)

    def words(self, name: str, *values: int) -> None:
        """A property of 32-bit words."""
        self._node.append(fdt.PropWords(name, *values))

    def flag(self, name: str) -> None:
        """A property without a value."""
        self._node.append(fdt.Property(name))

    def registers(self, *regions: tuple[int, int]) -> None:
        """Where its registers, or its memory, are: address and size of each range."""
        halves = [
            half for region in regions for number in region for half in (number >> 32, number & 0xFFFF_FFFF)
        ]
        self.words("reg", *halves)
