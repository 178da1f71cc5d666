"""Which hypervisor runs a machine: the registry of accelerators, and the one place that knows the implementations."""

import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sterna.hypervisor.interface import DirtyLogMode, HypervisorError, ManualProtect, Unsupported, Vm
from sterna.machine.boards import PC_MIN, VIRT, VIRT_ARM64, ArmBoard, Board, Isa

_KVM_HOSTS = {Isa.X86_64: "x86_64", Isa.ARMV7: "aarch64", Isa.ARM64: "aarch64"}
"""The hosts whose KVM runs such guests."""
_EMULATED_PACKAGES = ("numba", "unicorn")
"""What the emulated hypervisor needs and nothing else does: the compiler of guest mode, and the CPU."""
_KVM_BOARDS = {"x86_64": PC_MIN, "aarch64": VIRT_ARM64}

CheckBoard = Callable[[Board], None]
CreateVm = Callable[[Board, int, DirtyLogMode], Vm]


@dataclass(frozen=True)
class Accelerator:
    """What `--accel` names.

    :ivar check: looks whether there can be such a board's CPUs here, and raises `Unsupported` when not. It costs nothing
    :ivar create: makes a VM of so many vCPUs, without memory and devices, that keeps its dirty log so. It raises
        `Unsupported` when this host cannot have it; the text says what is missing
    :ivar board: that of a machine whose user names none
    :ivar dirty_logs: the ways in which its VMs can keep a dirty log
    """

    name: str
    check: CheckBoard
    create: CreateVm
    board: Board
    dirty_logs: Sequence[DirtyLogMode]


def check_emulated(board: Board) -> None:
    """Those that the emulated hypervisor has."""
    if not isinstance(board, ArmBoard) or board.isa is not Isa.ARMV7:
        raise Unsupported(
            f"accel emulated: there is no {board.isa.value} CPU; use accel kvm, or an ARMv7 board"
        )
    for package in _EMULATED_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise Unsupported(
                f"accel emulated: the Python package {package} is missing: pip install {package}"
            )


def emulated_vm(make: Callable[..., Vm], board: Board, smp: int, dirty_log: DirtyLogMode) -> Vm:
    """A VM of the emulated hypervisor's.

    :param make: its class, or one of its kind
    """
    assert isinstance(board, ArmBoard)
    vm = make(smp, secondaries_off=board.psci)
    if dirty_log is DirtyLogMode.MANUAL:
        vm.enable_manual_protect(ManualProtect.ENABLE | ManualProtect.INITIALLY_SET)
    return vm


def _emulated(board: Board, smp: int, dirty_log: DirtyLogMode) -> Vm:
    def make(smp: int, *, secondaries_off: bool) -> Vm:
        # Unicorn and the compiled kernels cost half a second, which other commands do not pay.
        from sterna.hypervisor.emulated.vm import EmulatedVm

        return EmulatedVm(smp, secondaries_off=secondaries_off)

    return emulated_vm(make, board, smp, dirty_log)


def _check_kvm(board: Board) -> None:
    host = _KVM_HOSTS[board.isa]
    if platform.machine() != host:
        raise Unsupported(
            f"accel kvm: {board.isa.value} guests need a host that is {host}, this one is {platform.machine()}; "
            "use accel emulated, or another board"
        )


def _kvm(board: Board, smp: int, dirty_log: DirtyLogMode) -> Vm:
    try:
        if isinstance(board, ArmBoard):
            from sterna.hypervisor.kvm.arm64.vm import Arm64KvmVm

            aarch32 = board.isa is Isa.ARMV7
            return Arm64KvmVm(smp, aarch32=aarch32, secondaries_off=board.psci, dirty_log=dirty_log)
        from sterna.hypervisor.kvm.x86.vm import X86KvmVm

        return X86KvmVm(smp, dirty_log=dirty_log)
    except Unsupported as error:
        raise Unsupported(f"accel kvm: {error}") from error
    except HypervisorError as error:
        raise HypervisorError(f"accel kvm: {error}") from error


EMULATED_LOGS = (DirtyLogMode.BITMAP, DirtyLogMode.MANUAL)

_ACCELERATORS: dict[str, Accelerator] = {}


def register(accelerator: Accelerator) -> None:
    """Add an accelerator, or put one in the place of its namesake. To be done before a machine is configured."""
    _ACCELERATORS[accelerator.name] = accelerator


register(Accelerator("emulated", check_emulated, _emulated, VIRT, EMULATED_LOGS))
register(Accelerator("kvm", _check_kvm, _kvm, _KVM_BOARDS.get(platform.machine(), VIRT), tuple(DirtyLogMode)))


def accelerators() -> tuple[str, ...]:
    """The names of those that there are."""
    return tuple(_ACCELERATORS)


def accelerator(name: str) -> Accelerator:
    """
    :raise KeyError: When there is none of that name.
    """
    return _ACCELERATORS[name]


def check_board(accel: str, board: Board) -> None:
    """Look whether there can be a board's CPUs here, before anything is made for it.

    :raise Unsupported: When not; the text says what would do.
    """
    accelerator(accel).check(board)


def create_vm(accel: str, board: Board, smp: int, dirty_log: DirtyLogMode = DirtyLogMode.BITMAP) -> Vm:
    """A VM without memory, devices and vCPUs.

    :param accel: one of `accelerators`
    :param dirty_log: how it is to keep its dirty log
    :raise Unsupported: When this host cannot have it; the text says what is missing.
    :raise HypervisorError: When it cannot be made for another reason.
    """
    check_board(accel, board)
    return accelerator(accel).create(board, smp, dirty_log)
