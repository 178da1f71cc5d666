"""The dirty log of one memory slot: enable, get, clear, disable, in the kernel's order. `fault.py` sets its bits."""

import numpy as np

from sterna.errors import Error
from sterna.memory.address import BITS_PER_WORD, Ipa, bitmap_words
from sterna.memory.bitmap import Words, full_bitmap, new_bitmap
from sterna.stage2.tables import Stage2
from sterna.stage2.tlb import RemoteTlbFlush


class DirtyLogError(Error):
    """A range that get or clear cannot work on."""


class DirtyLog:
    """Write protection of a slot and the bitmap of what was written since.

    Every page of the slot is dirty in the log or write-protected, from the return of the constructor to `disable`; with
    `initially_set` every page starts dirty and is protected when its bit is cleared.

    :ivar manual: `get` leaves bits and protection alone, and `clear` does its work
    """

    def __init__(
        self,
        stage2: Stage2,
        flush: RemoteTlbFlush,
        number: int,
        ipa: Ipa,
        pages: int,
        *,
        manual_protect: bool = False,
        initially_set: bool = False,
    ) -> None:
        self._stage2 = stage2
        self._flush = flush
        self._number = number
        self._ipa = ipa
        self._pages = pages
        self.manual = manual_protect
        self._bitmap: Words = full_bitmap(pages) if initially_set else new_bitmap(pages)
        # The bitmap first, then the protection: a write between the two is logged (Linux edde99ce0529).
        stage2.set_bitmap(number, self._bitmap)
        if not initially_set:
            self._protect_all()
        stage2.flush_tlbs(flush)

    def _protect_all(self) -> None:
        self._stage2.protect(self._ipa, self._pages * self._stage2.format.page_size)

    def get(self) -> Words:
        """KVM_GET_DIRTY_LOG: an owned copy of the log.

        Unless protection is manual, the log starts anew: each word is swapped for zero, its pages are protected, and the TLBs
        are flushed before this returns, so that a later write cannot go unseen.
        """
        if self.manual:
            return self._bitmap.copy()
        out = np.empty_like(self._bitmap)
        if self._stage2.harvest(self._ipa, self._bitmap, out):
            self._stage2.flush_tlbs(self._flush)
        return out

    def peek(self) -> Words:
        """An owned copy of the log, which goes on as it was."""
        return self._bitmap.copy()

    def clear(self, first_page: int, num_pages: int, words: Words) -> None:
        """KVM_CLEAR_DIRTY_LOG: clear the bits set in `words` and protect those pages again.

        :param first_page: the page of bit 0, a multiple of 64
        :param num_pages: a multiple of 64, or up to the end of the slot
        :raise DirtyLogError: When protection is not manual, or the range is not as above.
        """
        if not self.manual:
            raise DirtyLogError("clear needs manual protect: enable it before logging starts")
        if first_page % BITS_PER_WORD or first_page < 0:
            raise DirtyLogError(f"first page {first_page} is not a multiple of 64")
        end = first_page + num_pages
        if num_pages <= 0 or end > self._pages:
            raise DirtyLogError(f"pages {first_page} to {end} are not all in the slot's {self._pages}")
        if num_pages % BITS_PER_WORD and end != self._pages:
            raise DirtyLogError(f"{num_pages} pages: neither a multiple of 64 nor up to the slot's end")
        if words.size < bitmap_words(num_pages):
            raise DirtyLogError(f"a bitmap of {words.size} words does not cover {num_pages} pages")
        mask = words[: bitmap_words(num_pages)].copy()
        if num_pages % BITS_PER_WORD:
            mask[-1] &= np.uint64((1 << num_pages % BITS_PER_WORD) - 1)
        if self._stage2.clear(self._ipa, self._bitmap, first_page // BITS_PER_WORD, mask):
            self._stage2.flush_tlbs(self._flush)

    def mark(self, first_page: int, num_pages: int) -> None:
        """Log a write by the host to pages of the slot.

        :raise DirtyLogError: When a page is outside the slot.
        """
        if first_page < 0 or num_pages < 0 or first_page + num_pages > self._pages:
            raise DirtyLogError(
                f"pages {first_page} to {first_page + num_pages} are not all in the slot's {self._pages}"
            )
        self._stage2.mark(self._bitmap, first_page, num_pages)

    def move(self, ipa: Ipa) -> Words:
        """The slot is out of the tables and comes back at `ipa`: the bitmap to insert it with."""
        self._ipa = ipa
        return self._bitmap

    def disable(self) -> None:
        """Stop logging. Nothing is walked: pages still protected are let through, or rebuilt into blocks, as they fault."""
        self._stage2.set_bitmap(self._number, None)
