"""The host's KVM."""

import platform
from collections.abc import Callable

from sterna.hypervisor.accelerator import Accelerator
from sterna.hypervisor.architecture import Architecture
from sterna.hypervisor.interface import DirtyLogMode, HypervisorError, Unsupported, Vm

_BOARDS = {"x86_64": "pc-min", "aarch64": "virt-arm64"}


def _check(architecture: Architecture) -> None:
    if platform.machine() != architecture.kvm_host:
        raise Unsupported(
            f"accel kvm: {architecture.name} guests need a host that is {architecture.kvm_host}, this one is "
            f"{platform.machine()}; use accel emulated, or another board"
        )


def _create(architecture: Architecture, vcpus: int, dirty_log: DirtyLogMode, secondaries_off: bool) -> Vm:
    try:
        make: Callable[..., Vm] = architecture.kvm.load()
        return make(vcpus, dirty_log=dirty_log, secondaries_off=secondaries_off)
    except Unsupported as error:
        raise Unsupported(f"accel kvm: {error}") from error
    except HypervisorError as error:
        raise HypervisorError(f"accel kvm: {error}") from error


ACCELERATOR = Accelerator(
    "kvm",
    _check,
    _create,
    board=_BOARDS.get(platform.machine(), "virt"),
    dirty_logs=tuple(DirtyLogMode),
    kernels=("sterna.hypervisor.kvm.dirtyring",),
    device="/dev/kvm",
)
