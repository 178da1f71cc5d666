"""Which hypervisor runs a VM: what `--accel` names, and a VM of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sterna.hypervisor.architecture import ARCHITECTURES, DEFAULT, Architecture
from sterna.hypervisor.interface import ArgumentError, DirtyLogMode, Vm
from sterna.registry import Registry


@dataclass(frozen=True)
class Accelerator:
    """A hypervisor.

    :ivar check: looks whether there can be such CPUs here, and raises `Unsupported` when not. It costs nothing
    :ivar create: makes a VM of so many vCPUs, without memory and devices, that keeps its dirty log so; whether all vCPUs but the
        first are off until the guest starts them. It raises `Unsupported` when this host cannot have it; the text says what is
        missing
    :ivar board: that of a machine whose user names none
    :ivar dirty_logs: the ways in which its VMs can keep a dirty log
    :ivar kernels: modules whose kernels it calls, their own or those of what they import
    :ivar compiled: whether a VM cannot be made before its kernels are at hand
    :ivar device: the file without which there are no VMs; empty when it needs none
    :ivar cpus: the CPU models that it has of an architecture, as `Cpus.models`; of one that it has not at all, any
    """

    name: str
    check: Callable[[Architecture], None]
    create: Callable[[Architecture, int, DirtyLogMode, bool], Vm]
    board: str
    dirty_logs: tuple[DirtyLogMode, ...]
    kernels: tuple[str, ...] = ()
    compiled: bool = False
    device: str = ""
    cpus: Callable[[Architecture], Mapping[str, str]] = lambda architecture: architecture.kvm.models


ACCELERATORS: Registry[Accelerator] = Registry(
    "sterna.accelerators", "sterna.hypervisor.accelerators", "ACCELERATOR"
)


def check_arch(accel: str, arch: str = DEFAULT) -> Architecture:
    """Look whether there can be such CPUs here, before anything is made for them.

    :return: what their architecture is
    :raise UnknownName: When there is no such hypervisor.
    :raise ArgumentError: When nobody has such CPUs.
    :raise Unsupported: When there can be none here; the text says what would do.
    """
    if arch not in ARCHITECTURES:
        known = ", ".join(dict.fromkeys((DEFAULT, *ARCHITECTURES)))
        raise ArgumentError(f"no architecture {arch[:80]!r}; there are {known}")
    architecture = ARCHITECTURES.get(arch)
    ACCELERATORS.get(accel).check(architecture)
    return architecture


def open_vm(
    accel: str = "emulated",
    arch: str = DEFAULT,
    *,
    vcpus: int = 1,
    dirty_log: DirtyLogMode = DirtyLogMode.BITMAP,
    secondaries_off: bool = False,
) -> Vm:
    """A VM without memory, devices and vCPUs. To be closed.

    :param accel: one of `ACCELERATORS`
    :param arch: what its vCPUs run, one of `ARCHITECTURES`
    :param vcpus: how many it is to have
    :param dirty_log: how it is to keep its dirty log
    :param secondaries_off: all vCPUs but the first wait until the guest starts them (PSCI)
    :raise UnknownName, ArgumentError: When there is no such hypervisor, or architecture.
    :raise Unsupported: When this host cannot have it; the text says what is missing.
    :raise HypervisorError: When it cannot be made for another reason.
    """
    architecture = check_arch(accel, arch)
    return ACCELERATORS.get(accel).create(architecture, vcpus, dirty_log, secondaries_off)
