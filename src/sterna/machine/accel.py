"""Which hypervisor runs a machine: the one place that knows the implementations."""

import errno
import os
import platform

from sterna.hypervisor.interface import HypervisorError, Vm
from sterna.machine.boards import Board

_KVM_DEVICE = "/dev/kvm"


def create_vm(accel: str, board: Board, smp: int) -> Vm:
    """A VM without memory, devices and vCPUs.

    :param accel: ``emulated`` or ``kvm``
    :raise HypervisorError: When this host cannot have it; the text says what is missing.
    """
    if accel == "emulated":
        # Unicorn and the compiled kernels cost half a second, which other commands do not pay.
        from sterna.hypervisor.emulated.vm import EmulatedVm

        return EmulatedVm(smp, secondaries_off=board.psci)
    raise HypervisorError(f"accel {accel}: {_what_kvm_lacks()}; use accel emulated")


def _what_kvm_lacks() -> str:
    if platform.machine() != "aarch64":
        return f"ARM guests need an arm64 host's KVM, this host is {platform.machine()}"
    try:
        os.close(os.open(_KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        hint = " (add yourself to the group kvm)" if error.errno == errno.EACCES else ""
        return f"cannot open {_KVM_DEVICE}: {error.strerror}{hint}"
    return f"this version has no driver for {_KVM_DEVICE}"
