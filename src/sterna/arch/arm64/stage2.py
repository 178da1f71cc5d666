"""ARMv8's VMSAv8-64: stage-2 descriptors of its 4 KiB granule, for a 48-bit IPA (VTCR_EL2: TG0 0, T0SZ 16, SL0 2).

Sources: ARM DDI 0487, D4.2 (levels), D4.3 (descriptors), D4.4 (S2AP, XN), D4.5 (MemAttr, SH). Hardware updates of the access flag
and of dirty state (DBM) are not used, nor are contiguous entries.
"""

from sterna.stage2.format import DescriptorFormat

_PAGE_OR_TABLE = 0b11
_BLOCK = 0b01
_MEMATTR_WRITE_BACK = 0b1111 << 2
_MEMATTR_DEVICE_NGNRE = 0b0001 << 2
_S2AP_READ = 1 << 6
_S2AP_WRITE = 1 << 7
_SH_INNER = 0b11 << 8
_AF = 1 << 10
_XN = 1 << 54
_NORMAL = _MEMATTR_WRITE_BACK | _S2AP_READ | _SH_INNER | _AF

FORMAT = DescriptorFormat(
    shifts=(39, 30, 21, 12),
    root_entries=512,
    # At level 0 there are no blocks.
    largest_leaf=1 << 30,
    present=1,
    kind=0b11,
    table=_PAGE_OR_TABLE,
    address=((1 << 48) - 1) & ~0xFFF,
    write=_S2AP_WRITE,
    access=_AF,
    page=_NORMAL | _PAGE_OR_TABLE,
    block=_NORMAL | _BLOCK,
    device=_MEMATTR_DEVICE_NGNRE | _S2AP_READ | _S2AP_WRITE | _SH_INNER | _AF | _XN | _PAGE_OR_TABLE,
)
