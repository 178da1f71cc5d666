"""The emulated hypervisor."""

import importlib.util
from collections.abc import Callable

from sterna.hypervisor.accelerator import Accelerator
from sterna.hypervisor.architecture import Architecture
from sterna.hypervisor.interface import DirtyLogMode, ManualProtect, Unsupported, Vm

_PACKAGES = ("numba", "unicorn")
"""What the emulated hypervisor needs and nothing else does: the compiler of guest mode, and the CPU."""


def _check(architecture: Architecture) -> None:
    if architecture.emulated is None:
        raise Unsupported(
            f"accel emulated: there is no {architecture.name} CPU; use accel kvm, or an ARMv7 board"
        )
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise Unsupported(
                f"accel emulated: the Python package {package} is missing: pip install {package}"
            )


def emulated_vm(
    make: Callable[..., Vm],
    architecture: Architecture,
    vcpus: int,
    dirty_log: DirtyLogMode,
    secondaries_off: bool,
) -> Vm:
    """A VM of the emulated hypervisor's.

    :param make: its class, or one of its kind
    """
    vm = make(vcpus, arch=architecture.name, secondaries_off=secondaries_off)
    if dirty_log is DirtyLogMode.MANUAL:
        vm.enable_manual_protect(ManualProtect.ENABLE | ManualProtect.INITIALLY_SET)
    return vm


def _create(architecture: Architecture, vcpus: int, dirty_log: DirtyLogMode, secondaries_off: bool) -> Vm:
    # Unicorn and the compiled kernels cost half a second, which other commands do not pay.
    from sterna.hypervisor.emulated.vm import EmulatedVm

    return emulated_vm(EmulatedVm, architecture, vcpus, dirty_log, secondaries_off)


ACCELERATOR = Accelerator(
    "emulated",
    _check,
    _create,
    board="virt",
    dirty_logs=(DirtyLogMode.BITMAP, DirtyLogMode.MANUAL),
    cpus=lambda architecture: (architecture.emulated or architecture.kvm).models,
    kernels=("sterna.hypervisor.emulated.guestmode", "sterna.stage2.tables"),
    compiled=True,
)
