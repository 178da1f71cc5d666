"""System registers on the wire.

A QEMU stream lists them by KVM's one-reg ids (Linux, Documentation/virt/kvm/api.rst, 4.68), under two kinds: AArch32
registers, where bit 29 marks the non-secure bank, and for state that AArch64 also has, the AArch64 register, which may hold
two AArch32 registers (ARM DDI 0487, D1.20.1). A receiver refuses registers that it does not know.
"""

from collections.abc import Collection, Mapping

from sterna.arch.arm import sysreg
from sterna.arch.armv7 import cp15

NON_SECURE_BANK = 1 << 29
_SIZE = 0x00F0_0000_0000_0000
# Those that QEMU lists as AArch32 registers, alone or besides their AArch64 twin.
_AS_AARCH32 = (
    *(cp15.CPACR, cp15.DACR, cp15.IFSR, cp15.DFAR, cp15.IFAR, cp15.PAR, cp15.MAIR0, cp15.MAIR1),
    *(cp15.CONTEXTIDR, cp15.TPIDRURW, cp15.TPIDRURO, cp15.TPIDRPRW, cp15.CNTKCTL),
)
_WIRE: dict[int, tuple[int, ...]] = {
    **cp15.AARCH64,
    # QEMU's id is the architecture's.
    sysreg.encode(3, 3, 14, 3, 2): (cp15.CNTV_CVAL,),
    **{register | NON_SECURE_BANK: (register,) for register in _AS_AARCH32},
    # A guest of QEMU's without EL3 that sets VBAR has it in the secure bank's entry as well.
    cp15.VBAR: (cp15.VBAR,),
}
"""What each id on the wire holds of our registers: one, or two of 32 bits, the first of them in the lower half."""


def to_wire(registers: Mapping[int, int], others: Mapping[int, int]) -> dict[int, int]:
    """Values by wire id, ids ascending. Registers without a place among QEMU's go under their own id.

    :param others: registers that the CPU does not keep but a receiver wants to see, by wire id
    """
    values = dict(others)
    values |= {
        wire_id: sum((registers[part] & _mask(parts)) << 32 * i for i, part in enumerate(parts))
        for wire_id, parts in _WIRE.items()
        if all(part in registers for part in parts)
    }
    values |= {
        register | NON_SECURE_BANK: value
        for register, value in registers.items()
        if register not in cp15.REGISTERS
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
        parts = _WIRE.get(wire_id, (wire_id & ~NON_SECURE_BANK,) if wire_id & NON_SECURE_BANK else ())
        kept = {part: value >> 32 * i & _mask(parts) for i, part in enumerate(parts) if part in known}
        registers |= kept
        if not kept and value != others.get(wire_id, 0):
            left_out[wire_id] = value
    return registers, left_out


def _mask(parts: tuple[int, ...]) -> int:
    """The bits that each of the registers of a value on the wire has."""
    return (1 << 64 // len(parts)) - 1


def register_name(wire_id: int) -> str:
    """A register as its instructions name it: `S3_0_C1_C0_1`, or `p15, 0, c1, c0, 1`."""
    if wire_id & cp15.KIND == sysreg.KIND:
        return "S{}_{}_C{}_C{}_{}".format(*sysreg.decode(wire_id))
    crn, opc1, crm, opc2 = cp15.decode(wire_id)
    wide = wire_id & _SIZE == cp15.WIDE & _SIZE
    name = f"{opc1}, c{crm}" if wide else f"{opc1}, c{crn}, c{crm}, {opc2}"
    return f"p{wire_id >> 16 & 15}, {name}" + ("" if wire_id & NON_SECURE_BANK else " (secure)")
