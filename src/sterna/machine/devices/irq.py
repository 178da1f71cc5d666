"""Interrupt lines between devices and the interrupt controller."""

from collections.abc import Callable

IrqLine = Callable[[bool], None]
"""Sets the level of one interrupt line. May be called on any thread."""
