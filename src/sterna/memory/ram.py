"""Guest RAM: blocks of anonymous host memory."""

import ctypes
import mmap

import numpy as np
from numpy.typing import NDArray

from sterna.errors import Error
from sterna.host.closing import Closing
from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Hva

_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 14, 15  # include/uapi/asm-generic/mman-common.h
_MADV_POPULATE_WRITE = 23  # include/uapi/asm-generic/mman-common.h, since Linux 5.14
_MAP_NORESERVE = 0x4000  # include/uapi/asm-generic/mman-common.h; Python has no name for it before 3.13


class RamError(Error):
    """Guest RAM cannot be had from the host: its size is wrong, or the host lacks the memory."""


class RamBlock(Closing):
    """A named piece of guest RAM on private anonymous memory, 2 MiB aligned and advised for huge pages.

    :param huge_pages: False where memory must cost no more than the 4 KiB pages of it that are written to
    :param populated: whether the host gives all of the memory now, as far as it can, and not when it is touched

    :ivar name: the block's name on the wire, for example ``mach-virt.ram``
    :ivar size: bytes, a multiple of 4096
    :ivar hva: address of the first byte in this process
    :ivar data: the bytes, `shape (size,)`, dtype uint8; a write here bypasses the dirty log

    :raise RamError: When the size is not a positive multiple of the page size, or the host refuses the memory.
    """

    def __init__(self, name: str, size: int, *, huge_pages: bool = True, populated: bool = False) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise RamError(f"RAM block {name!r}: size {size} is not a positive multiple of {PAGE_SIZE} bytes")
        self.name = name
        self.size = size
        try:
            # One block's size more than asked for: stage 2 and the host can only map 2 MiB blocks when hva is aligned.
            self._mapping = mmap.mmap(
                -1, size + PMD_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            )
        except (OSError, OverflowError, ValueError) as error:
            raise RamError(f"RAM block {name!r}: the host cannot map {size} bytes: {error}") from error
        self._anchor = ctypes.c_char.from_buffer(self._mapping)
        start = ctypes.addressof(self._anchor)
        self._offset = -start % PMD_SIZE
        self.hva = Hva(start + self._offset)
        # Kernels without transparent huge pages answer EINVAL; the memory works all the same.
        try:
            self._mapping.madvise(_MADV_HUGEPAGE if huge_pages else _MADV_NOHUGEPAGE)
        except OSError:
            pass
        self.data: NDArray[np.uint8] = np.frombuffer(
            self._mapping, dtype=np.uint8, count=size, offset=self._offset
        )
        self._populated = populated
        self._populate()

    def _populate(self) -> None:
        if self._populated:
            try:
                self._mapping.madvise(_MADV_POPULATE_WRITE, self._offset, self.size)
            except OSError:  # an older kernel, or too little memory: what is touched comes then
                pass

    @property
    def pages(self) -> int:
        """Number of 4 KiB pages."""
        return self.size >> PAGE_SHIFT

    @property
    def view(self) -> memoryview:
        """The bytes as a memoryview, for vectored system calls and socket reads."""
        return memoryview(self._mapping)[self._offset : self._offset + self.size]

    def discard(self) -> None:
        """Give every page back to the host; the block reads as zeros again and stays mapped (MADV_DONTNEED). A populated
        block takes new ones.
        """
        self._mapping.madvise(mmap.MADV_DONTNEED, self._offset, self.size)
        self._populate()

    def close(self) -> None:
        """Give the memory back as soon as the last view of it is gone."""
        del self.data, self._anchor
        try:
            self._mapping.close()
        except BufferError:  # a view is still alive; the mapping goes with it
            pass

    def __repr__(self) -> str:
        return f"RamBlock({self.name!r}, {self.size:#x} bytes)"
