"""Registers one by one, by the kernel's ids (Documentation/virt/kvm/api.rst, 4.68, 4.69, 4.84)."""

import ctypes
import errno

from sterna.hypervisor.interface import HypervisorError
from sterna.hypervisor.kvm.ioctl import Descriptor, KvmError, iow, iowr


class OneReg(ctypes.Structure):
    """struct kvm_one_reg"""

    _fields_ = (("id", ctypes.c_uint64), ("addr", ctypes.c_uint64))


class RegList(ctypes.Structure):
    """struct kvm_reg_list, without the ids that follow"""

    _fields_ = (("n", ctypes.c_uint64),)


GET_ONE_REG = iow("KVM_GET_ONE_REG", 0xAB, OneReg)
SET_ONE_REG = iow("KVM_SET_ONE_REG", 0xAC, OneReg)
GET_REG_LIST = iowr("KVM_GET_REG_LIST", 0xB0, RegList)

_ARM64 = 0x6000_0000_0000_0000
_SIZE_SHIFT, _SIZE_MASK = 52, 0xF
_U32, _U64, _U128 = (log2 << _SIZE_SHIFT for log2 in (2, 3, 4))
_CORE, _SYSREG, _FIRMWARE = 0x10 << 16, 0x13 << 16, 0x14 << 16
_KIND = 0xFF << 16

# struct kvm_regs: general registers, sp, pc, pstate, sp_el1, elr_el1, spsr[5], then FP registers, aligned to 16 bytes.
_SP, _PC, _PSTATE, _SP_EL1, _ELR_EL1, _SPSR, _V, _FPSR, _FPCR = 248, 256, 264, 272, 280, 288, 336, 848, 852


def _core(size: int, offset: int) -> int:
    return _ARM64 | size | _CORE | offset // 4


def general(number: int) -> int:
    """x0 to x30."""
    return _core(_U64, 8 * number)


def vector(number: int) -> int:
    """v0 to v31."""
    return _core(_U128, _V + 16 * number)


SP = _core(_U64, _SP)
PC = _core(_U64, _PC)
PSTATE = _core(_U64, _PSTATE)
SP_EL1 = _core(_U64, _SP_EL1)
ELR_EL1 = _core(_U64, _ELR_EL1)
SPSR = {mode: _core(_U64, _SPSR + 8 * i) for i, mode in enumerate(("svc", "abt", "und", "irq", "fiq"))}
"""By AArch32 mode; that of svc is SPSR_EL1."""
FPSR = _core(_U32, _FPSR)
FPCR = _core(_U32, _FPCR)


def is_core(register: int) -> bool:
    """Whether it is one of struct kvm_regs."""
    return register & _KIND == _CORE


def is_system(register: int) -> bool:
    """Whether it is a system register."""
    return register & _KIND == _SYSREG


def is_firmware(register: int) -> bool:
    """Whether it is a setting of the kernel's PSCI and SMCCC services."""
    return register & _KIND == _FIRMWARE


def size_of(register: int) -> int:
    """Bytes of a register's value."""
    return 1 << (register >> _SIZE_SHIFT & _SIZE_MASK)


def get(vcpu: Descriptor, register: int) -> int:
    """A register's value.

    :raise KvmError: When the vCPU has no such register.
    """
    value = ctypes.create_string_buffer(size_of(register))
    vcpu.call(GET_ONE_REG, OneReg(register, ctypes.addressof(value)))
    return int.from_bytes(value.raw, "little")


def put(vcpu: Descriptor, register: int, value: int) -> None:
    """Set a register.

    :raise HypervisorError: When this host cannot have the value; the text has the one that it has.
    """
    size = size_of(register)
    if value >> 8 * size:
        raise HypervisorError(f"register {register:#x}: {value:#x} has more than {size} bytes")
    content = ctypes.create_string_buffer(value.to_bytes(size, "little"), size)
    request = OneReg(register, ctypes.addressof(content))
    try:
        vcpu.call(SET_ONE_REG, request)
    except KvmError as error:
        if error.errno in (errno.EINVAL, errno.EPERM, errno.ENOENT, errno.EBUSY):
            if (here := _value_here(vcpu, register)) == value:
                return
            shown = "it does not exist" if here is None else f"it is {here:#x}"
            raise HypervisorError(
                f"register {register:#x} cannot be set to {value:#x} on this host: {shown}"
            ) from error
        raise


def _value_here(vcpu: Descriptor, register: int) -> int | None:
    try:
        return get(vcpu, register)
    except KvmError:
        return None


def list_registers(vcpu: Descriptor) -> list[int]:
    """The ids of all registers that make up a vCPU's state, as the kernel tells them."""
    head = RegList(0)
    error, _ = vcpu.attempt(GET_REG_LIST, head)
    if error not in (0, errno.E2BIG):
        raise KvmError(GET_REG_LIST, head, error)
    answer = (ctypes.c_uint64 * (1 + head.n))(head.n)
    vcpu.call(GET_REG_LIST, answer)
    return list(answer[1 : 1 + answer[0]])
