"""System registers of a Cortex-A15 that a migration stream has besides those our CPUs keep.

A QEMU receiver checks each register of its own against the stream and fails where a register that says what the hardware is does
not have its value; of those that are missing it does not know what to expect. So a stream carries all of them, with
the values they have after a reset: the guest cannot change them here. (Seen in the streams of qemu-system-arm 7.2, board
``virt``; the values of identification registers are in ARM DDI 0438I, 4.2.)
"""

from functools import cache

from sterna.arch.arm.sysreg import KIND as _AARCH64
from sterna.arch.armv7.cp15 import NARROW, WIDE
from sterna.arch.armv7.wire import NON_SECURE_BANK

_SECURE_CP15, _SECURE_CP15_WIDE = NARROW, WIDE
_CP15 = NARROW | NON_SECURE_BANK
_CP14, _CP14_WIDE = 0x4020_0000_200E_0000, 0x4030_0000_200E_0000

_REGISTERS = {
    _SECURE_CP15: "0010 0800 1000 1001 1800 2801 3000 3002 3a00 5100 5101 6800 6801 6802 6803 6804",
    _CP14: (
        "0000 0004 0005 0006 0007 0030 0038 0084 0085 0086 0087 0102 0104 0105 0106 0107 0184 0185 0186 0187 0204 0205 "
        "0284 0285 0800 0830 0838 0884 0984 1000 1038 3800 3801 3802"
    ),
    _CP15: (
        "0000 0001 0002 0003 0009 000f 0080 0082 0083 0084 0085 0086 0087 0100 0101 0102 0103 0104 0105 0106 0107 0180 "
        "0200 0280 0300 0380 0801 0821 2880 2881 3001 3a00 480a 480b 4e03 4f00 5180 5181 6800 7820"
    ),
    _SECURE_CP15_WIDE: "0380",
    _CP14_WIDE: "0080 0100",
    _AARCH64: (
        "8004 8005 8006 8007 800c 800d 800e 800f 8012 8014 8015 8016 8017 801c 801d 801e 801f 8024 8025 802c 802d 8080 "
        "808c 809c 9808 c008 c00a c00b c00c c00d c00e c00f c010 c011 c012 c013 c014 c015 c016 c017 c081 c288 c289 c4f1 "
        "c518 c801 c807 d801 dce0 dce1 dce5 dce8 df00 df11 df12 df40 df41 df42 df43 df44 df45 df60 df61 df62 df63 df64 "
        "df65 df7f e081 f081 f510 ff11 ff12"
    ),
}
"""Encodings, in the low half of the id, by kind of register."""

_IDENTIFICATION = {
    0x0080: 0x0000_1131,  # ID_PFR1
    0x0082: 0x0201_0505,  # ID_DFR0
    0x0084: 0x1020_1105,  # ID_MMFR0
    0x0085: 0x2000_0000,  # ID_MMFR1
    0x0086: 0x0124_0000,  # ID_MMFR2
    0x0087: 0x0210_2211,  # ID_MMFR3
    0x0100: 0x0210_1110,  # ID_ISAR0
    0x0101: 0x1311_2111,  # ID_ISAR1
    0x0102: 0x2123_2041,  # ID_ISAR2
    0x0103: 0x1111_2131,  # ID_ISAR3
    0x0104: 0x1001_1142,  # ID_ISAR4
}
_OTHERS = {
    _SECURE_CP15 | 0x0800: 0x00C5_0078,  # SCTLR
    _CP14 | 0x0000: 0x3515_F021,  # DBGDIDR
    _CP14 | 0x0884: 0x0000_000A,  # DBGOSLSR
    _CP14 | 0x3802: 0x0111_0F13,  # ThumbEE and Jazelle space, as QEMU has it
    _CP15 | 0x0000: 0x414F_C0F0,  # MIDR: r4p0
    _CP15 | 0x0001: 0x8444_C004,  # CTR
    _CP15 | 0x0009: 0x0A20_0023,  # CLIDR
    _AARCH64 | 0x808C: 0x0000_000A,  # OSLSR_EL1
    _AARCH64 | 0xC801: 0x0A20_0023,  # CLIDR_EL1
    _AARCH64 | 0xD801: 0x8444_C004,  # CTR_EL0
    _AARCH64 | 0xDCE0: 0x410F_3000,  # PMCR_EL0
    _AARCH64 | 0xDF00: 0x03B9_ACA0,  # CNTFRQ_EL0: 62.5 MHz
}
_CBAR = _CP15 | 0x7820
_L2CTLR = _CP15 | 0x480A
_L2CTLR_BASE = 1 << 23
_L2CTLR_CPUS_SHIFT = 24


@cache
def reset_values(smp: int, peripheral_base: int) -> dict[int, int]:
    """Values by wire id.

    :param smp: number of CPUs, which L2CTLR says
    :param peripheral_base: address of the CPUs' own devices, which CBAR says
    """
    values = {
        kind | int(encoding, 16): 0
        for kind, encodings in _REGISTERS.items()
        for encoding in encodings.split()
    }
    for encoding, value in _IDENTIFICATION.items():
        values[_CP15 | encoding] = value
        # The AArch64 encodings: op0 3, CRn 0, and CRm and op2 as here.
        values[_AARCH64 | 0xC000 | (encoding >> 7) << 3 | encoding & 7] = value
    values |= _OTHERS
    values[_CBAR] = peripheral_base
    values[_L2CTLR] = (smp - 1) << _L2CTLR_CPUS_SHIFT | _L2CTLR_BASE
    return values
