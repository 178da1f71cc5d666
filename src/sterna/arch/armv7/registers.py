"""The emulated CPU's registers, read and written through Unicorn."""

from typing import Any

from unicorn import arm_const as arm

from sterna.arch.armv7.state import ArmVcpuState

# System registers: struct uc_arm_cp_reg without its value (coprocessor, is64, bank, CRn, CRm, opc1, opc2). Bank 0 is the
# guest's: despite the field's name `sec`, it is the non-secure one.
CpReg = tuple[int, int, int, int, int, int, int]

SCR: CpReg = (15, 0, 1, 1, 1, 0, 0)  # exists in the other bank only
NSACR: CpReg = (15, 0, 1, 1, 1, 0, 2)
HCR: CpReg = (15, 0, 0, 1, 1, 4, 0)
VTCR: CpReg = (15, 0, 0, 2, 1, 4, 2)
VTTBR: CpReg = (15, 1, 0, 0, 2, 6, 0)
HPFAR: CpReg = (15, 0, 0, 6, 0, 4, 4)
VMPIDR: CpReg = (15, 0, 0, 0, 0, 4, 5)
CNTVOFF: CpReg = (15, 1, 0, 0, 14, 4, 0)
CNTVCT: CpReg = (15, 1, 0, 0, 14, 1, 0)
CNTV_CVAL: CpReg = (15, 1, 0, 0, 14, 3, 0)

SCR_NS, SCR_HCE = 1 << 0, 1 << 8
NSACR_CP10, NSACR_CP11 = 1 << 10, 1 << 11

_GUEST_BANK = 0
_KVM_REG_ARM = 0x4000_0000_0000_0000
_KVM_REG_SIZE_U32 = 0x0020_0000_0000_0000
_KVM_REG_SIZE_U64 = 0x0030_0000_0000_0000
_KVM_CP15 = 0x000F_0000


def one_reg_id(is64: int, crn: int, crm: int, opc1: int, opc2: int) -> int:
    """The KVM one-reg id of a cp15 register (Linux, Documentation/virt/kvm/api.rst, 4.68)."""
    if is64:
        return _KVM_REG_ARM | _KVM_REG_SIZE_U64 | _KVM_CP15 | crm << 7 | opc1 << 3
    return _KVM_REG_ARM | _KVM_REG_SIZE_U32 | _KVM_CP15 | crn << 11 | crm << 7 | opc1 << 3 | opc2


# ARM DDI 0406C.c, B3.17: (is64, CRn, CRm, opc1, opc2) of every writable system register of the guest's that Unicorn keeps.
# Where a register has a 32-bit and a 64-bit view, only the wide one is here.
_SAVED = (
    (0, 1, 0, 0, 0),  # SCTLR
    (0, 1, 0, 0, 2),  # CPACR
    (1, 0, 2, 0, 0),  # TTBR0
    (1, 0, 2, 1, 0),  # TTBR1
    (0, 2, 0, 0, 2),  # TTBCR
    (0, 3, 0, 0, 0),  # DACR
    (0, 5, 0, 0, 0),  # DFSR
    (0, 5, 0, 0, 1),  # IFSR
    (0, 6, 0, 0, 0),  # DFAR
    (0, 6, 0, 0, 2),  # IFAR
    (1, 0, 7, 0, 0),  # PAR
    (0, 10, 2, 0, 0),  # PRRR, MAIR0
    (0, 10, 2, 0, 1),  # NMRR, MAIR1
    (0, 12, 0, 0, 0),  # VBAR
    (0, 13, 0, 0, 1),  # CONTEXTIDR
    (0, 13, 0, 0, 2),  # TPIDRURW
    (0, 13, 0, 0, 3),  # TPIDRURO
    (0, 13, 0, 0, 4),  # TPIDRPRW
    (0, 0, 0, 2, 0),  # CSSELR
    (0, 14, 1, 0, 0),  # CNTKCTL
    (1, 0, 14, 3, 0),  # CNTV_CVAL
    (0, 14, 3, 0, 1),  # CNTV_CTL
)
SAVED: dict[int, CpReg] = {
    one_reg_id(*fields): (15, fields[0], _GUEST_BANK, *fields[1:]) for fields in _SAVED
}
"""System registers that a saved state holds, by one-reg id."""

_MODE_MASK = 0x1F
_USR = 0x10
_MODES = {"fiq": 0x11, "irq": 0x12, "svc": 0x13, "abt": 0x17, "und": 0x1B}
_GENERAL = [arm.UC_ARM_REG_R0 + i for i in range(13)] + [
    arm.UC_ARM_REG_SP,
    arm.UC_ARM_REG_LR,
    arm.UC_ARM_REG_PC,
]
_DOUBLES = [arm.UC_ARM_REG_D0 + i for i in range(32)]


def read_cp(uc: Any, register: CpReg) -> int:
    """A system register's value."""
    return int(uc.reg_read(arm.UC_ARM_REG_CP_REG, register))


def write_cp(uc: Any, register: CpReg, value: int) -> None:
    """Set a system register."""
    uc.reg_write(arm.UC_ARM_REG_CP_REG, (*register, value))


def cp_words(register: CpReg) -> list[int]:
    """struct uc_arm_cp_reg as five 64-bit words; the last is the value."""
    cp, is64, secure, crn, crm, opc1, opc2 = register
    return [cp | is64 << 32, secure | crn << 32, crm | opc1 << 32, opc2, 0]


def save(uc: Any, counter: int, powered_off: bool) -> ArmVcpuState:
    """All registers the guest can see. The CPU's current mode is left as it was."""
    cpsr = int(uc.reg_read(arm.UC_ARM_REG_CPSR))
    regs = [int(uc.reg_read(register)) for register in _GENERAL]
    banked: dict[str, int] = {}
    for mode, number in (("usr", _USR), *_MODES.items()):
        uc.reg_write(arm.UC_ARM_REG_CPSR, cpsr & ~_MODE_MASK | number)
        banked[f"sp_{mode}"] = int(uc.reg_read(arm.UC_ARM_REG_SP))
        banked[f"lr_{mode}"] = int(uc.reg_read(arm.UC_ARM_REG_LR))
        if mode in ("usr", "fiq"):
            for i in range(8, 13):
                banked[f"r{i}_{mode}"] = int(uc.reg_read(arm.UC_ARM_REG_R0 + i))
        if mode != "usr":
            banked[f"spsr_{mode}"] = int(uc.reg_read(arm.UC_ARM_REG_SPSR))
    uc.reg_write(arm.UC_ARM_REG_CPSR, cpsr)
    return ArmVcpuState(
        regs=regs,
        cpsr=cpsr,
        banked=banked,
        cp15={one_reg: read_cp(uc, register) for one_reg, register in SAVED.items()},
        vfp=[int(uc.reg_read(register)) for register in _DOUBLES],
        fpscr=int(uc.reg_read(arm.UC_ARM_REG_FPSCR)),
        fpexc=int(uc.reg_read(arm.UC_ARM_REG_FPEXC)),
        counter=counter,
        powered_off=powered_off,
    )


def restore(uc: Any, state: ArmVcpuState) -> None:
    """Set all registers; ids of system registers that Unicorn does not keep are passed over."""
    for one_reg, register in SAVED.items():
        if one_reg in state.cp15:
            write_cp(uc, register, state.cp15[one_reg])
    for mode, number in (("usr", _USR), *_MODES.items()):
        uc.reg_write(arm.UC_ARM_REG_CPSR, state.cpsr & ~_MODE_MASK | number)
        if mode in ("usr", "fiq"):
            for i in range(8, 13):
                uc.reg_write(arm.UC_ARM_REG_R0 + i, state.banked[f"r{i}_{mode}"])
        uc.reg_write(arm.UC_ARM_REG_SP, state.banked[f"sp_{mode}"])
        uc.reg_write(arm.UC_ARM_REG_LR, state.banked[f"lr_{mode}"])
        if mode != "usr":
            uc.reg_write(arm.UC_ARM_REG_SPSR, state.banked[f"spsr_{mode}"])
    uc.reg_write(arm.UC_ARM_REG_CPSR, state.cpsr)
    thumb = state.cpsr >> 5 & 1
    for register, value in zip(_GENERAL, state.regs, strict=True):
        uc.reg_write(register, value | thumb if register == arm.UC_ARM_REG_PC else value)
    uc.reg_write(arm.UC_ARM_REG_FPEXC, state.fpexc)
    for register, value in zip(_DOUBLES, state.vfp, strict=True):
        uc.reg_write(register, value)
    uc.reg_write(arm.UC_ARM_REG_FPSCR, state.fpscr)
