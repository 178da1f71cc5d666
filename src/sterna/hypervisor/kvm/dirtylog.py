"""The dirty log as a bitmap per slot (Documentation/virt/kvm/api.rst, 4.8 and 4.117)."""

import ctypes
import errno
import mmap

import numpy as np

from sterna.hypervisor.interface import HypervisorError, ManualProtect, MemorySlot
from sterna.hypervisor.kvm.ioctl import Descriptor, KvmError, Request, iow, iowr
from sterna.hypervisor.kvm.system import Capability, enable
from sterna.memory.address import BITS_PER_WORD
from sterna.memory.bitmap import Words, new_bitmap

LOG_PAGE_SHIFT = mmap.PAGESIZE.bit_length() - 1
"""Of the pages in KVM's dirty logs, bitmaps and rings alike: they are the host kernel's (api.rst, 4.8)."""
CLEAR_PAGES = 1 << 18
"""Pages cleared per call: the kernel holds its MMU lock for so long."""


class DirtyLogArgument(ctypes.Structure):
    """struct kvm_dirty_log"""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("padding1", ctypes.c_uint32),
        ("dirty_bitmap", ctypes.c_uint64),
    )


class ClearDirtyLogArgument(ctypes.Structure):
    """struct kvm_clear_dirty_log"""

    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("num_pages", ctypes.c_uint32),
        ("first_page", ctypes.c_uint64),
        ("dirty_bitmap", ctypes.c_uint64),
    )


GET_DIRTY_LOG = iow("KVM_GET_DIRTY_LOG", 0x42, DirtyLogArgument)
CLEAR_DIRTY_LOG = iowr("KVM_CLEAR_DIRTY_LOG", 0xC0, ClearDirtyLogArgument)

_ADVICE = {
    errno.ENOENT: "the slot's dirty log is off",
    errno.ENXIO: "the VM keeps its dirty log in rings",
    errno.EINVAL: "ranges are multiples of 64 pages, or reach to the slot's end",
}


class BitmapLog:
    """GET_DIRTY_LOG, and CLEAR_DIRTY_LOG once manual protect is on.

    :ivar manual: whether GET leaves the log and the protection alone
    """

    def __init__(self, vm: Descriptor) -> None:
        self._vm = vm
        self.manual = ManualProtect.OFF

    def enable_manual(self, flags: ManualProtect) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, for logs that start from now on.

        :raise HypervisorError: When the kernel cannot.
        """
        enable(self._vm, Capability.MANUAL_DIRTY_LOG_PROTECT2, int(flags))
        self.manual = flags

    def get(self, slot: MemorySlot) -> Words:
        """KVM_GET_DIRTY_LOG: a copy of the slot's bitmap.

        :raise KvmError: When the log is off.
        """
        words = new_bitmap(slot.size >> LOG_PAGE_SHIFT)
        self._call(GET_DIRTY_LOG, DirtyLogArgument(slot.slot, 0, words.ctypes.data))
        return words

    def clear(self, slot: MemorySlot, first_page: int, num_pages: int, words: Words) -> None:
        """KVM_CLEAR_DIRTY_LOG: clear the bits set in `words` (bit 0 is `first_page`) and protect their pages again. The arguments
        have been checked (`sterna.hypervisor.arguments.clear_range`).

        :raise HypervisorError: When manual protect is off.
        """
        if not self.manual:
            raise HypervisorError(
                f"memory slot {slot.slot}: clear needs manual protect: enable it before logging starts"
            )
        self._call(
            CLEAR_DIRTY_LOG, ClearDirtyLogArgument(slot.slot, num_pages, first_page, words.ctypes.data)
        )

    def clear_found(self, slot: MemorySlot, words: Words) -> None:
        """The second half of a harvest with manual protect: clear what `get` found, where there is any.

        :raise KvmError: When the kernel refuses; a part may be cleared.
        """
        pages = slot.size >> LOG_PAGE_SHIFT
        starts = range(0, words.size, CLEAR_PAGES // BITS_PER_WORD)
        for start, found in zip(starts, np.bitwise_or.reduceat(words, starts), strict=True):
            if found:
                self._clear(slot, start, pages, words)

    def _clear(self, slot: MemorySlot, start: int, pages: int, words: Words) -> None:
        first = start * BITS_PER_WORD
        at = words.ctypes.data + start * words.itemsize
        count = min(CLEAR_PAGES, pages - first)
        self._call(CLEAR_DIRTY_LOG, ClearDirtyLogArgument(slot.slot, count, first, at))

    def _call(self, request: Request, argument: ctypes.Structure) -> None:
        try:
            self._vm.call(request, argument)
        except KvmError as error:
            raise KvmError(request, argument, error.errno, _ADVICE.get(error.errno, "")) from None
