"""Interrupt lines between devices and the interrupt controller."""

from collections.abc import Callable

SPI, PPI = 0, 1
EDGE_RISING, LEVEL_HIGH = 1, 4
"""An interrupt in the device tree: shared or a CPU's own, its number among those, how it is signalled (binding arm,gic)."""

IrqLine = Callable[[bool], None]
"""Sets the level of one interrupt line. May be called on any thread."""
