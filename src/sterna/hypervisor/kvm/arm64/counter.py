"""The frequency of this host's generic timer."""

import ctypes
import functools
import mmap

_MRS_X0_CNTFRQ_EL0 = 0xD53B_E000
_RET = 0xD65F_03C0


@functools.cache
def frequency() -> int:
    """CNTFRQ_EL0, in Hz. No file of the kernel's has it; programs may read the register (ARM DDI 0487, D13.8.1)."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page[:8] = _MRS_X0_CNTFRQ_EL0.to_bytes(4, "little") + _RET.to_bytes(4, "little")
        anchor = ctypes.c_char.from_buffer(page)
        value = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))()
        del anchor
    return int(value)
