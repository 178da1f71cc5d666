"""KVM's vCPUs that run an ARMv7 guest: their state, between the registers that KVM has for it and those of ARMv7.

KVM shows such a vCPU as the AArch64 registers that the architecture maps the AArch32 ones to (ARM DDI 0487, D1.20.1 and the
descriptions of the registers).
"""

from collections.abc import Callable
from dataclasses import dataclass

from sterna.arch.arm.kvm import init, onereg
from sterna.arch.arm.kvm.onereg import system
from sterna.arch.arm.kvm.vcpu import ArmKvmVcpu
from sterna.arch.arm.kvm.vm import ArmKvmVm
from sterna.arch.armv7.state import ArmVcpuState
from sterna.hypervisor.kvm.system import Capability

_WIDE = 0x4030_0000_000F_0000
_IS_WIDE = 1 << 52
_NARROW = 0x4020_0000_000F_0000


def _cp15(crn: int, opc1: int, crm: int, opc2: int) -> int:
    return _NARROW | crn << 11 | crm << 7 | opc1 << 3 | opc2


def _cp15_wide(opc1: int, crm: int) -> int:
    return _WIDE | crm << 7 | opc1 << 3


@dataclass(frozen=True)
class _Half:
    """Where a cp15 register stands in an AArch64 one."""

    register: int
    shift: int = 0

    @property
    def mask(self) -> int:
        """Its bits, once shifted down. What KVM has above those of a register that is never 64 bits wide is no state."""
        return _DOUBLE if self.register & _IS_WIDE else _WORD


_SYSTEM: dict[int, tuple[_Half, ...]] = {
    system(3, 0, 1, 0, 0): (_Half(_cp15(1, 0, 0, 0)),),  # SCTLR
    system(3, 0, 1, 0, 2): (_Half(_cp15(1, 0, 0, 2)),),  # CPACR
    system(3, 0, 2, 0, 0): (_Half(_cp15_wide(0, 2)),),  # TTBR0
    system(3, 0, 2, 0, 1): (_Half(_cp15_wide(1, 2)),),  # TTBR1
    system(3, 0, 2, 0, 2): (_Half(_cp15(2, 0, 0, 2)),),  # TTBCR
    system(3, 4, 3, 0, 0): (_Half(_cp15(3, 0, 0, 0)),),  # DACR
    system(3, 0, 5, 2, 0): (_Half(_cp15(5, 0, 0, 0)),),  # DFSR
    system(3, 4, 5, 0, 1): (_Half(_cp15(5, 0, 0, 1)),),  # IFSR
    system(3, 0, 6, 0, 0): (  # DFAR, IFAR
        _Half(_cp15(6, 0, 0, 0)),
        _Half(_cp15(6, 0, 0, 2), 32),
    ),
    system(3, 0, 7, 4, 0): (_Half(_cp15_wide(0, 7)),),  # PAR
    system(3, 0, 10, 2, 0): (  # MAIR0 and MAIR1, or PRRR and NMRR
        _Half(_cp15(10, 0, 2, 0)),
        _Half(_cp15(10, 0, 2, 1), 32),
    ),
    system(3, 0, 12, 0, 0): (_Half(_cp15(12, 0, 0, 0)),),  # VBAR
    system(3, 0, 13, 0, 1): (_Half(_cp15(13, 0, 0, 1)),),  # CONTEXTIDR
    system(3, 3, 13, 0, 2): (_Half(_cp15(13, 0, 0, 2)),),  # TPIDRURW
    system(3, 3, 13, 0, 3): (_Half(_cp15(13, 0, 0, 3)),),  # TPIDRURO
    system(3, 0, 13, 0, 4): (_Half(_cp15(13, 0, 0, 4)),),  # TPIDRPRW
    system(3, 2, 0, 0, 0): (_Half(_cp15(0, 2, 0, 0)),),  # CSSELR
    system(3, 0, 14, 1, 0): (_Half(_cp15(14, 0, 1, 0)),),  # CNTKCTL
    onereg.TIMER_COMPARE: (_Half(_cp15_wide(3, 14)),),  # CNTV_CVAL
    onereg.TIMER_CONTROL: (_Half(_cp15(14, 0, 3, 1)),),  # CNTV_CTL
}
_FPEXC = system(3, 4, 5, 3, 0)
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
_MODES = {0x10: "usr", 0x11: "fiq", 0x12: "irq", 0x13: "svc", 0x17: "abt", 0x1B: "und", 0x1F: "usr"}
_MODE_MASK = 0x1F
_WORD = 0xFFFF_FFFF
_DOUBLE = (1 << 64) - 1

_Read = Callable[[int], int]
_Write = Callable[[int, int], None]


def read_state(read: _Read, powered_off: bool) -> ArmVcpuState:
    """An ARMv7 CPU's registers.

    :param read: gives the value of a register by KVM's id
    """
    cpsr = read(onereg.PSTATE) & _WORD
    mode = _MODES[cpsr & _MODE_MASK]
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
            half.register: read(register) >> half.shift & half.mask
            for register, halves in _SYSTEM.items()
            for half in halves
        },
        vfp=[part for value in vectors for part in (value & _DOUBLE, value >> 64)],
        fpscr=read(onereg.FPSR) & _FPSR_BITS | read(onereg.FPCR) & _FPCR_BITS,
        fpexc=read(_FPEXC) & _WORD,
        counter=read(onereg.TIMER_COUNTER),
        powered_off=powered_off,
    )


def write_state(state: ArmVcpuState, write: _Write) -> None:
    """Put an ARMv7 CPU's registers into a vCPU; all but the counter, which the VM's vCPUs share.

    :param write: sets a register by KVM's id
    """
    mode = _MODES[state.cpsr & _MODE_MASK]
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
    for register, halves in _SYSTEM.items():
        if all(half.register in state.cp15 for half in halves):
            write(register, sum((state.cp15[half.register] & half.mask) << half.shift for half in halves))
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
