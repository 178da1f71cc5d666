"""Address types and the page sizes of guest memory.

An IPA (intermediate physical address) is what the guest takes for a physical address, an hva an
address in this process. All are plain integers at run time; the names keep them apart for readers and
for the type checker.
"""

from typing import NewType

Ipa = NewType("Ipa", int)
Hva = NewType("Hva", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PMD_SHIFT = 21
PMD_SIZE = 1 << PMD_SHIFT
"""What one level-2 block maps: 2 MiB, 512 pages."""
PUD_SHIFT = 30
PUD_SIZE = 1 << PUD_SHIFT
"""What one level-1 block maps: 1 GiB."""
PAGES_PER_PMD = PMD_SIZE >> PAGE_SHIFT
BITS_PER_WORD = 64
"""Dirty bitmaps are arrays of 64-bit little-endian words, as in KVM_GET_DIRTY_LOG."""


def bitmap_words(pages: int) -> int:
    """Number of 64-bit words in a dirty bitmap of `pages` pages."""
    return (pages + BITS_PER_WORD - 1) // BITS_PER_WORD
