"""A hypervisor that logs in pages of 64 KiB, as KVM does where the host's kernel has such pages."""

import numpy as np

from sterna.hypervisor.emulated.vm import EmulatedVm
from sterna.memory.bitmap import Words, new_bitmap, widen
from sterna.stage2.dirtylog import DirtyLog

LOG_PAGE_BITS = 16
PAGES = 16
"""Of 4 KiB, in each of the log's."""


class CoarseLog(DirtyLog):
    """One bit for what are 16 pages to stage 2."""

    def __init__(self, stage2, flush, number, ipa, pages, **options) -> None:
        super().__init__(stage2, flush, number, ipa, pages * PAGES, **options)

    def get(self) -> Words:
        return _gathered(super().get())

    def peek(self) -> Words:
        return _gathered(super().peek())

    def clear(self, first_page: int, num_pages: int, words: Words) -> None:
        pages = num_pages * PAGES
        super().clear(first_page * PAGES, pages, widen(words, PAGES, pages))

    def mark(self, first_page: int, num_pages: int) -> None:
        super().mark(first_page * PAGES, num_pages * PAGES)


def _gathered(words: Words) -> Words:
    """One bit where any of 16 is set."""
    bits = words.view(np.uint16) != 0
    gathered = new_bitmap(bits.size)
    packed = np.packbits(bits, bitorder="little")
    gathered.view(np.uint8)[: packed.size] = packed
    return gathered


class CoarseVm(EmulatedVm):
    log_class = CoarseLog
    log_page_bits = LOG_PAGE_BITS
