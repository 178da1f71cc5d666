"""Which platform a board has."""

from collections.abc import Mapping
from typing import Any

from sterna.arch.arm64.platform import Arm64Platform
from sterna.arch.armv7.platform import ArmPlatform
from sterna.arch.x86_64.platform import X86Platform
from sterna.hypervisor.accelerator import Isa
from sterna.hypervisor.interface import Vm
from sterna.machine.board import Board
from sterna.machine.platforms import Platform

_PLATFORMS: Mapping[Isa, type[Platform[Any, Any]]] = {
    Isa.ARMV7: ArmPlatform,
    Isa.ARM64: Arm64Platform,
    Isa.X86_64: X86Platform,
}
"""By what a board's CPUs are; it has what such CPUs need, and a VM of the board has been made with such vCPUs."""


def platform_of(board: Board) -> type[Platform[Any, Any]]:
    """A board's kind of platform."""
    return _PLATFORMS[board.isa]


def create_platform(vm: Vm, board: Board, smp: int) -> Platform[Any, Any]:
    """The CPUs of a new VM, and the devices that go with them."""
    return platform_of(board)(board, [vm.create_vcpu(index) for index in range(smp)])
