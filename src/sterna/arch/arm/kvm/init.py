"""What kind of CPU a vCPU is, and whether it runs (Documentation/virt/kvm/api.rst, 4.82, 4.83)."""

import ctypes
from enum import IntFlag

from sterna.hypervisor.kvm.ioctl import Descriptor, ior, iow
from sterna.hypervisor.kvm.run import GET_MP_STATE, SET_MP_STATE, MpState


class VcpuInit(ctypes.Structure):
    """struct kvm_vcpu_init"""

    _fields_ = (("target", ctypes.c_uint32), ("features", ctypes.c_uint32 * 7))


ARM_VCPU_INIT = iow("KVM_ARM_VCPU_INIT", 0xAE, VcpuInit)
ARM_PREFERRED_TARGET = ior("KVM_ARM_PREFERRED_TARGET", 0xAF, VcpuInit)

_RUNNABLE, _STOPPED = 0, 5


class Feature(IntFlag):
    """KVM_ARM_VCPU_*, as bits."""

    POWER_OFF = 1 << 0
    EL1_32BIT = 1 << 1
    PSCI_0_2 = 1 << 2


def init_vcpu(vm: Descriptor, vcpu: Descriptor, features: Feature) -> None:
    """Make it the host's kind of CPU, as after a reset."""
    request = VcpuInit()
    vm.call(ARM_PREFERRED_TARGET, request)
    request.features = (ctypes.c_uint32 * 7)(int(features))
    vcpu.call(ARM_VCPU_INIT, request)


def is_powered_off(vcpu: Descriptor) -> bool:
    """Whether it waits for PSCI to start it."""
    state = MpState()
    vcpu.call(GET_MP_STATE, state)
    return bool(state.mp_state == _STOPPED)


def set_powered_off(vcpu: Descriptor, off: bool) -> None:
    """Let it wait for PSCI, or run."""
    vcpu.call(SET_MP_STATE, MpState(_STOPPED if off else _RUNNABLE))
