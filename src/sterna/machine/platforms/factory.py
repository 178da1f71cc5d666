"""Which platform a board has."""

from typing import Any, cast

from sterna.hypervisor.accelerator import Isa
from sterna.hypervisor.arm import ArmVcpu
from sterna.hypervisor.arm64 import Arm64Vcpu
from sterna.hypervisor.interface import Vm
from sterna.hypervisor.x86 import X86Vcpu
from sterna.machine.board import ArmBoard, Board, X86Board
from sterna.machine.platforms import Platform
from sterna.machine.platforms.arm import ArmPlatform
from sterna.machine.platforms.arm64 import Arm64Platform
from sterna.machine.platforms.x86 import X86Platform


def create_platform(vm: Vm, board: Board, smp: int) -> Platform[Any]:
    """The CPUs of a new VM, and the devices that go with them."""
    vcpus = [vm.create_vcpu(index) for index in range(smp)]
    # A VM of this board has been made with vCPUs of its kind.
    if board.isa is Isa.ARM64:
        assert isinstance(board, ArmBoard)
        return Arm64Platform(board, cast(list[Arm64Vcpu], vcpus))
    if isinstance(board, ArmBoard):
        return ArmPlatform(board, cast(list[ArmVcpu], vcpus))
    assert isinstance(board, X86Board)
    return X86Platform(board, cast(list[X86Vcpu], vcpus))
