"""ARMv7 with the Large Physical Address Extension: stage-2 descriptors and the registers that point to them.

Sources: ARM DDI 0406C.c, B3.6 (long-descriptor format), B4.1.159 (VTCR), B4.1.160 (VTTBR), B4.1.62 (HCR).
"""

from sterna.stage2.format import DescriptorFormat

_PAGE_OR_TABLE = 0b11
_BLOCK = 0b01
_MEMATTR_WRITE_BACK = 0xF << 2
_MEMATTR_DEVICE = 0x1 << 2
_HAP_READ = 1 << 6
_HAP_WRITE = 1 << 7
_SH_INNER = 3 << 8
_AF = 1 << 10
_XN = 1 << 54
_NORMAL = _MEMATTR_WRITE_BACK | _HAP_READ | _SH_INNER | _AF

FORMAT = DescriptorFormat(
    # A 40-bit IPA starting at level 1 takes two concatenated tables of 512 entries (B3.6.5).
    shifts=(30, 21, 12),
    root_entries=1024,
    largest_leaf=1 << 30,
    present=1,
    kind=0b11,
    table=_PAGE_OR_TABLE,
    address=((1 << 40) - 1) & ~0xFFF,
    write=_HAP_WRITE,
    access=_AF,
    page=_NORMAL | _PAGE_OR_TABLE,
    block=_NORMAL | _BLOCK,
    device=_MEMATTR_DEVICE | _HAP_READ | _HAP_WRITE | _SH_INNER | _AF | _XN | _PAGE_OR_TABLE,
)

VTCR = 0x8000_3558
"""40-bit IPA: T0SZ = -8 (field 8, S set), SL0 = 1 (start at level 1), walks inner shareable and write-back."""
HCR_VM = 1
"""HCR.VM: stage-2 translation is on for PL1 and PL0."""


def vttbr(root: int, vmid: int) -> int:
    """The translation table base register for tables at physical address `root` and a VMID of 1 to 255.

    VMID 0 is the host's.
    """
    return vmid << 48 | root
