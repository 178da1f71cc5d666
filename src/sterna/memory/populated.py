"""Which of a block's memory the host has behind it, for whoever must not populate the rest by reading it.

The kernel names the ranges that are present or swapped out (PAGEMAP_SCAN, since Linux 6.7, include/uapi/linux/fs.h); where it
cannot, /proc/self/pagemap has a word for each page (Documentation/admin-guide/mm/pagemap.rst).
"""

import fcntl
import os
import struct
import sys

import numpy as np
from numpy.typing import NDArray

from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE
from sterna.memory.ram import RamBlock

_PAGEMAP = "/proc/self/pagemap"
_SCAN = struct.Struct("=12Q")
"""struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
category_anyof_mask, return_mask.
"""
_PAGEMAP_SCAN = 3 << 30 | _SCAN.size << 16 | ord("f") << 8 | 16
"""_IOWR('f', 16, struct pm_scan_arg)."""
_WALK_END_AT = 4 * 8
_IS_PRESENT, _IS_SWAPPED = 1 << 3, 1 << 4
_RANGES = 1024
"""Ranges asked for at once."""
_PRESENT_OR_SWAPPED = np.uint64(0b11 << 62)
"""Bits of a word of the pagemap."""


def populated(block: RamBlock, first: int, end: int, group: int) -> NDArray[np.bool_]:
    """Which groups of pages have at least one page with memory behind it.

    All of them where the kernel does not tell. The answer is a snapshot; a page may be populated right after it.

    :param first: page number of the first group's first page
    :param end: page number after the last page; the last group may be short
    :param group: pages in each group
    :return: one value for each group
    """
    groups = (end - first + group - 1) // group
    try:
        fd = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return np.ones(groups, dtype=np.bool_)
    start = (block.hva >> PAGE_SHIFT) + first
    try:
        try:
            return _scan(fd, start, start + end - first, group, groups)
        except OSError:
            return _read(fd, start, start + end - first, group, groups)
    except OSError:
        return np.ones(groups, dtype=np.bool_)
    finally:
        os.close(fd)


def _scan(fd: int, start: int, end: int, group: int, groups: int) -> NDArray[np.bool_]:
    """:param start: as `end`, a page number in this process' address space
    :raise OSError: When the kernel has no such call, or does not say how far it got.
    """
    # How many ranges begin in a group, less those that ended before it.
    steps = np.zeros(groups + 1, dtype=np.int64)
    ranges = np.empty((_RANGES, 3), dtype=np.uint64)
    kinds = _IS_PRESENT | _IS_SWAPPED
    at, stop = start * PAGE_SIZE, end * PAGE_SIZE
    while at < stop:
        argument = bytearray(
            _SCAN.pack(_SCAN.size, 0, at, stop, 0, ranges.ctypes.data, _RANGES, 0, 0, 0, kinds, kinds)
        )
        count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
        pages = (ranges[:count, :2] >> np.uint64(PAGE_SHIFT)).astype(np.int64) - start
        np.add.at(steps, pages[:, 0] // group, 1)
        np.add.at(steps, (pages[:, 1] - 1) // group + 1, -1)
        walked = int.from_bytes(argument[_WALK_END_AT : _WALK_END_AT + 8], sys.byteorder)
        if walked <= at:
            # What was not looked at must not pass for empty.
            raise OSError("PAGEMAP_SCAN got nowhere")
        at = walked
    return np.asarray(np.cumsum(steps[:-1]) > 0)


def _read(fd: int, start: int, end: int, group: int, groups: int) -> NDArray[np.bool_]:
    """The same, page by page.

    :raise OSError: When the kernel does not tell.
    """
    entries = np.zeros(groups * group, dtype=np.uint64)
    raw = entries.view(np.uint8).data[: (end - start) * 8]
    done = 0
    while done < len(raw):
        got = os.preadv(fd, [raw[done:]], start * 8 + done)
        if got <= 0:
            raise OSError(f"{_PAGEMAP} ends early")
        done += got
    return np.asarray((entries & _PRESENT_OR_SWAPPED).reshape(groups, group).any(axis=1))
