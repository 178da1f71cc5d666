"""AArch64 system registers, by KVM's ids of them (Linux, Documentation/virt/kvm/api.rst, 4.68)."""

KIND = 0x6030_0000_0013_0000


def encode(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The id of a register."""
    return KIND | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


def decode(register: int) -> tuple[int, int, int, int, int]:
    """op0, op1, CRn, CRm and op2 of an id."""
    return register >> 14 & 3, register >> 11 & 7, register >> 7 & 15, register >> 3 & 15, register & 7


CNTV_CTL = encode(3, 3, 14, 3, 1)
# The kernel's ABI has the ids of these two exchanged: each is what it is named here.
CNTV_CVAL, CNTVCT = encode(3, 3, 14, 0, 2), encode(3, 3, 14, 3, 2)
CNTPCT = encode(3, 3, 14, 0, 1)
"""It may be set from Linux 6.4 on: such a kernel lists it."""
