"""KVM's vCPUs that run an ARMv7 guest: their state, between the registers that KVM has for it and those of ARMv7.

KVM shows such a vCPU as the AArch64 registers that the architecture maps the AArch32 ones to (ARM DDI 0487, D1.20.1 and the
descriptions of the registers).
"""

from collections.abc import Callable

from sterna.arch.arm import sysreg
from sterna.arch.arm.kvm import init, onereg
from sterna.arch.arm.kvm.vcpu import ArmKvmVcpu
from sterna.arch.arm.kvm.vm import ArmKvmVm
from sterna.arch.armv7 import cp15
from sterna.arch.armv7.state import BANKS, MODE_MASK, ArmVcpuState
from sterna.hypervisor.kvm.system import Capability

_SYSTEM = {
    sysreg.encode(3, 4, 3, 0, 0): (cp15.DACR,),
    sysreg.encode(3, 4, 5, 0, 1): (cp15.IFSR,),
    sysreg.encode(3, 0, 7, 4, 0): (cp15.PAR,),
    # Before the timer is switched on.
    sysreg.CNTV_CVAL: (cp15.CNTV_CVAL,),
    **cp15.AARCH64,
}
_FPEXC = sysreg.encode(3, 4, 5, 3, 0)
_FPSR_BITS, _FPCR_BITS = 0xF800_009F, 0x07FF_9F00
"""What of FPSCR is in FPSR, and what in FPCR."""
# Which general register holds the banked r8 to r12, and sp and lr, of each mode.
_R8_TO_R12 = {"usr": 8, "fiq": 24}
_SP_LR = {
    "usr": (13, 14),
    "irq": (17, 16),
    "svc": (19, 18),
    "abt": (21, 20),
    "und": (23, 22),
    "fiq": (29, 30),
}
_WORD = 0xFFFF_FFFF
_DOUBLE = (1 << 64) - 1

_Read = Callable[[int], int]
_Write = Callable[[int, int], None]


def _mask(register: int) -> int:
    """A register's bits. What KVM has above those of one that is never 64 bits wide is no state."""
    return _DOUBLE if cp15.is_wide(register) else _WORD


def read_state(read: _Read, powered_off: bool) -> ArmVcpuState:
    """An ARMv7 CPU's registers.

    :param read: gives the value of a register by KVM's id
    """
    cpsr = read(onereg.PSTATE) & _WORD
    mode = BANKS[cpsr & MODE_MASK]
    held = [read(onereg.general(number)) & _WORD for number in range(31)]
    high = _R8_TO_R12.get(mode, _R8_TO_R12["usr"])
    sp, lr = _SP_LR[mode]
    banked = {f"r{8 + i}_{bank}": held[first + i] for bank, first in _R8_TO_R12.items() for i in range(5)}
    for bank, (sp_at, lr_at) in _SP_LR.items():
        banked[f"sp_{bank}"], banked[f"lr_{bank}"] = held[sp_at], held[lr_at]
    banked |= {f"spsr_{bank}": read(register) & _WORD for bank, register in onereg.SPSR.items()}
    vectors = [read(onereg.vector(number)) for number in range(16)]
    return ArmVcpuState(
        regs=[*held[:8], *held[high : high + 5], held[sp], held[lr], read(onereg.PC) & _WORD],
        cpsr=cpsr,
        banked=banked,
        cp15={
            part: read(register) >> 32 * i & _mask(part)
            for register, parts in _SYSTEM.items()
            for i, part in enumerate(parts)
        },
        vfp=[part for value in vectors for part in (value & _DOUBLE, value >> 64)],
        fpscr=read(onereg.FPSR) & _FPSR_BITS | read(onereg.FPCR) & _FPCR_BITS,
        fpexc=read(_FPEXC) & _WORD,
        counter=read(sysreg.CNTVCT),
        powered_off=powered_off,
    )


def write_state(state: ArmVcpuState, write: _Write) -> None:
    """Put an ARMv7 CPU's registers into a vCPU; all but the counter, which the VM's vCPUs share.

    :param write: sets a register by KVM's id
    """
    mode = BANKS[state.cpsr & MODE_MASK]
    held = state.regs[:8] + [0] * 23
    for bank, first in _R8_TO_R12.items():
        held[first : first + 5] = [state.banked[f"r{8 + i}_{bank}"] for i in range(5)]
    for bank, (sp_at, lr_at) in _SP_LR.items():
        held[sp_at], held[lr_at] = state.banked[f"sp_{bank}"], state.banked[f"lr_{bank}"]
    high = _R8_TO_R12.get(mode, _R8_TO_R12["usr"])
    held[high : high + 5] = state.regs[8:13]
    sp, lr = _SP_LR[mode]
    held[sp], held[lr] = state.regs[13], state.regs[14]
    # The mode first: what may be written to the rest depends on it.
    write(onereg.PSTATE, state.cpsr)
    for number, value in enumerate(held):
        write(onereg.general(number), value)
    write(onereg.PC, state.regs[15])
    for bank, register in onereg.SPSR.items():
        write(register, state.banked[f"spsr_{bank}"])
    for register, parts in _SYSTEM.items():
        if all(part in state.cp15 for part in parts):
            write(register, sum((state.cp15[part] & _mask(part)) << 32 * i for i, part in enumerate(parts)))
    for number in range(16):
        write(onereg.vector(number), state.vfp[2 * number] | state.vfp[2 * number + 1] << 64)
    write(onereg.FPSR, state.fpscr & _FPSR_BITS)
    write(onereg.FPCR, state.fpscr & _FPCR_BITS)
    write(_FPEXC, state.fpexc)


class Aarch32KvmVcpu(ArmKvmVcpu):
    """One vCPU of an ARMv7 guest."""

    def get_state(self) -> ArmVcpuState:
        """All registers."""
        self.finish_access()
        return read_state(lambda register: onereg.get(self.fd, register), init.is_powered_off(self.fd))

    def set_state(self, state: ArmVcpuState) -> None:
        """Replace all registers."""
        self.finish_access()
        write_state(state, lambda register, value: onereg.put(self.fd, register, value))
        init.set_powered_off(self.fd, state.powered_off)


class Armv7KvmVm(ArmKvmVm):
    """A VM for ARMv7 guests."""

    vcpu_class = Aarch32KvmVcpu
    features = ArmKvmVm.features | init.Feature.EL1_32BIT
    _required = (*ArmKvmVm._required, Capability.ARM_EL1_32BIT)
