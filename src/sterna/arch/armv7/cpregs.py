"""System registers on the wire.

A QEMU stream lists them by KVM's one-reg ids (Linux, Documentation/virt/kvm/api.rst, 4.68), under two kinds: AArch32
registers, where bit 29 marks the non-secure bank, and for state that AArch64 also has, the AArch64 register, which may hold
two AArch32 registers (ARM DDI 0487, D1.20.1). A receiver refuses registers that it does not know.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

NON_SECURE_BANK = 1 << 29
_AARCH64 = 0x6030_0000_0013_0000
_AARCH32 = 0x4020_0000_000F_0000
_AARCH32_WIDE = 0x4030_0000_000F_0000
_KIND = ~0xFFFF
_SIZE = 0x00F0_0000_0000_0000


def aarch64_id(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The id of an AArch64 system register."""
    return _AARCH64 | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


def aarch32_id(crn: int, opc1: int, crm: int, opc2: int) -> int:
    """The id of a 32-bit cp15 register."""
    return _AARCH32 | crn << 11 | crm << 7 | opc1 << 3 | opc2


def aarch32_wide_id(opc1: int, crm: int) -> int:
    """The id of a 64-bit cp15 register."""
    return _AARCH32_WIDE | crm << 7 | opc1 << 3


@dataclass(frozen=True)
class Part:
    """Where a register stands in a value on the wire."""

    register: int
    shift: int = 0
    bits: int = 64

    @property
    def mask(self) -> int:
        """The register's bits, at position 0."""
        return (1 << self.bits) - 1


SCTLR = aarch32_id(1, 0, 0, 0)
_VBAR = aarch32_id(12, 0, 0, 0)
CNTV_CTL = aarch32_id(14, 0, 3, 1)
CNTV_CVAL = aarch32_wide_id(3, 14)

# ARM DDI 0487, table D12-2 and the descriptions of the registers: what each is architecturally mapped to.
_AS_AARCH64: dict[int, tuple[Part, ...]] = {
    aarch64_id(3, 0, 1, 0, 0): (Part(SCTLR),),
    aarch64_id(3, 0, 1, 0, 2): (Part(aarch32_id(1, 0, 0, 2)),),  # CPACR
    aarch64_id(3, 0, 2, 0, 0): (Part(aarch32_wide_id(0, 2)),),  # TTBR0
    aarch64_id(3, 0, 2, 0, 1): (Part(aarch32_wide_id(1, 2)),),  # TTBR1
    aarch64_id(3, 0, 2, 0, 2): (Part(aarch32_id(2, 0, 0, 2)),),  # TTBCR
    aarch64_id(3, 0, 5, 2, 0): (Part(aarch32_id(5, 0, 0, 0)),),  # DFSR
    aarch64_id(3, 0, 6, 0, 0): (
        Part(aarch32_id(6, 0, 0, 0), 0, 32),  # DFAR
        Part(aarch32_id(6, 0, 0, 2), 32, 32),  # IFAR
    ),
    aarch64_id(3, 0, 10, 2, 0): (
        Part(aarch32_id(10, 0, 2, 0), 0, 32),  # MAIR0, PRRR
        Part(aarch32_id(10, 0, 2, 1), 32, 32),  # MAIR1, NMRR
    ),
    aarch64_id(3, 0, 12, 0, 0): (Part(_VBAR),),
    aarch64_id(3, 0, 13, 0, 1): (Part(aarch32_id(13, 0, 0, 1)),),  # CONTEXTIDR
    aarch64_id(3, 3, 13, 0, 2): (Part(aarch32_id(13, 0, 0, 2)),),  # TPIDRURW
    aarch64_id(3, 3, 13, 0, 3): (Part(aarch32_id(13, 0, 0, 3)),),  # TPIDRURO
    aarch64_id(3, 0, 13, 0, 4): (Part(aarch32_id(13, 0, 0, 4)),),  # TPIDRPRW
    aarch64_id(3, 2, 0, 0, 0): (Part(aarch32_id(0, 2, 0, 0)),),  # CSSELR
    aarch64_id(3, 0, 14, 1, 0): (Part(aarch32_id(14, 0, 1, 0)),),  # CNTKCTL
    aarch64_id(3, 3, 14, 3, 1): (Part(CNTV_CTL),),
    aarch64_id(3, 3, 14, 3, 2): (Part(CNTV_CVAL),),
}
# Those that QEMU lists as AArch32 registers, alone or besides their AArch64 twin.
_AS_AARCH32 = (
    aarch32_id(1, 0, 0, 2),  # CPACR
    aarch32_id(3, 0, 0, 0),  # DACR
    aarch32_id(5, 0, 0, 1),  # IFSR
    aarch32_id(6, 0, 0, 0),  # DFAR
    aarch32_id(6, 0, 0, 2),  # IFAR
    aarch32_wide_id(0, 7),  # PAR
    aarch32_id(10, 0, 2, 0),  # MAIR0, PRRR
    aarch32_id(10, 0, 2, 1),  # MAIR1, NMRR
    aarch32_id(13, 0, 0, 1),  # CONTEXTIDR
    aarch32_id(13, 0, 0, 2),  # TPIDRURW
    aarch32_id(13, 0, 0, 3),  # TPIDRURO
    aarch32_id(13, 0, 0, 4),  # TPIDRPRW
    aarch32_id(14, 0, 1, 0),  # CNTKCTL
)
WIRE: dict[int, tuple[Part, ...]] = _AS_AARCH64 | {
    register | NON_SECURE_BANK: (Part(register),) for register in _AS_AARCH32
}
# A guest of QEMU's without EL3 that sets VBAR has it in the secure bank's entry as well.
WIRE[_VBAR] = (Part(_VBAR),)
"""What each id on the wire holds of our registers."""
_ON_WIRE = {part.register for parts in WIRE.values() for part in parts}


def to_wire(registers: Mapping[int, int], others: Mapping[int, int]) -> dict[int, int]:
    """Values by wire id, ids ascending. Registers without a place among QEMU's go under their own id.

    :param others: registers that the CPU does not keep but a receiver wants to see, by wire id
    """
    values = dict(others)
    values |= {
        wire_id: sum((registers[part.register] & part.mask) << part.shift for part in parts)
        for wire_id, parts in WIRE.items()
        if all(part.register in registers for part in parts)
    }
    values |= {
        register | NON_SECURE_BANK: value for register, value in registers.items() if register not in _ON_WIRE
    }
    return dict(sorted(values.items()))


def from_wire(
    values: Mapping[int, int], known: Collection[int], others: Mapping[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """Registers by one-reg id, and what was left out although it may matter: values by wire id.

    :param values: values by wire id, in the order of the wire; where two ids hold the same register, the later counts
    :param known: registers that the hypervisor keeps
    :param others: values, by wire id, of registers that it does not keep and that never change; of those not listed, 0
    """
    registers: dict[int, int] = {}
    left_out: dict[int, int] = {}
    for wire_id, value in values.items():
        parts = WIRE.get(wire_id, (Part(wire_id & ~NON_SECURE_BANK),) if wire_id & NON_SECURE_BANK else ())
        kept = [part for part in parts if part.register in known]
        for part in kept:
            registers[part.register] = value >> part.shift & part.mask
        if not kept and value != others.get(wire_id, 0):
            left_out[wire_id] = value
    return registers, left_out


def register_name(wire_id: int) -> str:
    """A register as its instructions name it: `S3_0_C1_C0_1`, or `p15, 0, c1, c0, 1`."""
    if wire_id & _KIND == _AARCH64:
        op0, op1, crn, crm, op2 = (
            wire_id >> shift & mask for shift, mask in ((14, 3), (11, 7), (7, 15), (3, 15), (0, 7))
        )
        return f"S{op0}_{op1}_C{crn}_C{crm}_{op2}"
    coprocessor, wide = wire_id >> 16 & 15, wire_id & _SIZE == _AARCH32_WIDE & _SIZE
    opc1, crm = wire_id >> 3 & 15, wire_id >> 7 & 15
    name = f"{opc1}, c{crm}" if wide else f"{opc1}, c{wire_id >> 11 & 15}, c{crm}, {wire_id & 7}"
    return f"p{coprocessor}, {name}" + ("" if wire_id & NON_SECURE_BANK else " (secure)")
