"""The host's KVM."""

import platform

from sterna.hypervisor.accelerator import Accelerator, Isa
from sterna.hypervisor.interface import DirtyLogMode, HypervisorError, Unsupported, Vm

_HOSTS = {Isa.X86_64: "x86_64", Isa.ARMV7: "aarch64", Isa.ARM64: "aarch64"}
"""The hosts whose KVM runs such guests."""
_BOARDS = {"x86_64": "pc-min", "aarch64": "virt-arm64"}


def _check(isa: Isa) -> None:
    host = _HOSTS[isa]
    if platform.machine() != host:
        raise Unsupported(
            f"accel kvm: {isa} guests need a host that is {host}, this one is {platform.machine()}; "
            "use accel emulated, or another board"
        )


def _create(isa: Isa, vcpus: int, dirty_log: DirtyLogMode, secondaries_off: bool) -> Vm:
    try:
        if isa is Isa.X86_64:
            from sterna.arch.x86_64.kvm.vm import X86KvmVm

            return X86KvmVm(vcpus, dirty_log=dirty_log)
        from sterna.arch.arm64.kvm import Arm64KvmVm
        from sterna.arch.armv7.kvm import Armv7KvmVm

        kind = Armv7KvmVm if isa is Isa.ARMV7 else Arm64KvmVm
        return kind(vcpus, secondaries_off=secondaries_off, dirty_log=dirty_log)
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
