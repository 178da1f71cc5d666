"""Which hypervisor runs a machine: the one place that knows the implementations."""

import os
import platform

from sterna.hypervisor.interface import DirtyLogMode, HypervisorError, ManualProtect, Vm
from sterna.machine.boards import ArmBoard, Board, Isa

_KVM_HOSTS = {Isa.X86_64: "x86_64", Isa.ARMV7: "aarch64", Isa.ARM64: "aarch64"}
"""The hosts whose KVM runs such guests."""

BREAKAGE_VARIABLE = "STERNA_TEST_BREAKAGE"
"""For tests of the test bed: the environment variable that names a fault which the emulated hypervisor is to have."""


def create_vm(accel: str, board: Board, smp: int, dirty_log: DirtyLogMode = DirtyLogMode.BITMAP) -> Vm:
    """A VM without memory, devices and vCPUs.

    :param accel: ``emulated`` or ``kvm``
    :param dirty_log: how it is to keep its dirty log
    :raise HypervisorError: When this host cannot have it; the text says what is missing.
    """
    return _emulated(board, smp, dirty_log) if accel == "emulated" else _kvm(board, smp, dirty_log)


def _emulated(board: Board, smp: int, dirty_log: DirtyLogMode) -> Vm:
    if not isinstance(board, ArmBoard) or board.isa is not Isa.ARMV7:
        raise HypervisorError(
            f"accel emulated: there is no {board.isa.value} CPU; use accel kvm, or an ARMv7 board"
        )
    # Unicorn and the compiled kernels cost half a second, which other commands do not pay.
    from sterna.hypervisor.emulated.vm import EmulatedVm

    vm_class = EmulatedVm
    if breakage := os.environ.get(BREAKAGE_VARIABLE):
        from sterna.hypervisor.emulated.broken import broken_vm

        vm_class = broken_vm(breakage)
    vm = vm_class(smp, secondaries_off=board.psci)
    if dirty_log is DirtyLogMode.MANUAL:
        vm.enable_manual_protect(ManualProtect.ENABLE | ManualProtect.INITIALLY_SET)
    return vm


def _kvm(board: Board, smp: int, dirty_log: DirtyLogMode) -> Vm:
    host = _KVM_HOSTS[board.isa]
    if platform.machine() != host:
        raise HypervisorError(
            f"accel kvm: {board.isa.value} guests need a host that is {host}, this one is {platform.machine()}; "
            "use accel emulated, or another board"
        )
    try:
        if isinstance(board, ArmBoard):
            from sterna.hypervisor.kvm.arm64.vm import Arm64KvmVm

            aarch32 = board.isa is Isa.ARMV7
            return Arm64KvmVm(smp, aarch32=aarch32, secondaries_off=board.psci, dirty_log=dirty_log)
        from sterna.hypervisor.kvm.x86.vm import X86KvmVm

        return X86KvmVm(smp, dirty_log=dirty_log)
    except HypervisorError as error:
        raise HypervisorError(f"accel kvm: {error}") from error
