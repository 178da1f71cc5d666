"""System registers of an ARMv7 guest, by KVM's ids of them (Linux, Documentation/virt/kvm/api.rst, 4.68)."""

from sterna.arch.arm.sysreg import encode as aarch64

NARROW, WIDE = 0x4020_0000_000F_0000, 0x4030_0000_000F_0000
"""Registers of 32, and of 64 bits."""
KIND = ~0xFFFF


def narrow(crn: int, opc1: int, crm: int, opc2: int) -> int:
    """The id of a 32-bit register."""
    return NARROW | crn << 11 | crm << 7 | opc1 << 3 | opc2


def wide(opc1: int, crm: int) -> int:
    """The id of a 64-bit register."""
    return WIDE | crm << 7 | opc1 << 3


def is_wide(register: int) -> bool:
    """Whether a register has 64 bits."""
    return register & KIND == WIDE


def decode(register: int) -> tuple[int, int, int, int]:
    """CRn, opc1, CRm and opc2 of an id; of a 64-bit register CRn and opc2 are 0."""
    return register >> 11 & 15, register >> 3 & 15, register >> 7 & 15, register & 7


SCTLR = narrow(1, 0, 0, 0)
CPACR = narrow(1, 0, 0, 2)
TTBR0, TTBR1 = wide(0, 2), wide(1, 2)
TTBCR = narrow(2, 0, 0, 2)
DACR = narrow(3, 0, 0, 0)
DFSR, IFSR = narrow(5, 0, 0, 0), narrow(5, 0, 0, 1)
DFAR, IFAR = narrow(6, 0, 0, 0), narrow(6, 0, 0, 2)
PAR = wide(0, 7)
MAIR0, MAIR1 = narrow(10, 0, 2, 0), narrow(10, 0, 2, 1)
"""Or PRRR and NMRR."""
VBAR = narrow(12, 0, 0, 0)
CONTEXTIDR = narrow(13, 0, 0, 1)
TPIDRURW, TPIDRURO, TPIDRPRW = (narrow(13, 0, 0, opc2) for opc2 in (2, 3, 4))
CSSELR = narrow(0, 2, 0, 0)
CNTKCTL = narrow(14, 0, 1, 0)
CNTV_CTL, CNTV_CVAL = narrow(14, 0, 3, 1), wide(3, 14)

REGISTERS = (
    *(SCTLR, CPACR, TTBR0, TTBR1, TTBCR, DACR, DFSR, IFSR, DFAR, IFAR, PAR, MAIR0, MAIR1, VBAR, CONTEXTIDR),
    *(TPIDRURW, TPIDRURO, TPIDRPRW, CSSELR, CNTKCTL, CNTV_CVAL, CNTV_CTL),
)
"""What a state has: every writable system register of a guest's (ARM DDI 0406C.c, B3.17). Of one with a 32-bit and a 64-bit view,
only the wide one.
"""
AARCH64: dict[int, tuple[int, ...]] = {
    aarch64(3, 0, 1, 0, 0): (SCTLR,),
    aarch64(3, 0, 1, 0, 2): (CPACR,),
    aarch64(3, 0, 2, 0, 0): (TTBR0,),
    aarch64(3, 0, 2, 0, 1): (TTBR1,),
    aarch64(3, 0, 2, 0, 2): (TTBCR,),
    aarch64(3, 0, 5, 2, 0): (DFSR,),
    aarch64(3, 0, 6, 0, 0): (DFAR, IFAR),
    aarch64(3, 0, 10, 2, 0): (MAIR0, MAIR1),
    aarch64(3, 0, 12, 0, 0): (VBAR,),
    aarch64(3, 0, 13, 0, 1): (CONTEXTIDR,),
    aarch64(3, 3, 13, 0, 2): (TPIDRURW,),
    aarch64(3, 3, 13, 0, 3): (TPIDRURO,),
    aarch64(3, 0, 13, 0, 4): (TPIDRPRW,),
    aarch64(3, 2, 0, 0, 0): (CSSELR,),
    aarch64(3, 0, 14, 1, 0): (CNTKCTL,),
    aarch64(3, 3, 14, 3, 1): (CNTV_CTL,),
}
"""The AArch64 registers that they are in; of two, the first is in the lower half (ARM DDI 0487, table D12-2 and the
descriptions of the registers). KVM and QEMU each have some more.
"""
