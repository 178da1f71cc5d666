"""Arguments of a hypervisor's calls, checked in one place for all of them: what comes after this goes into C structures and
compiled code, where a number that does not fit becomes another number and a pointer is taken at its word.

An integer is one of Python's or numpy's; a truth value or a float is none.
"""

import numpy as np

from sterna.hypervisor.interface import ArgumentError, HypervisorError, ManualProtect
from sterna.memory.address import BITS_PER_WORD, bitmap_words
from sterna.memory.bitmap import Words

U64_MAX = (1 << 64) - 1


def integer(name: str, value: object, most: int = U64_MAX, least: int = 0) -> int:
    """An integer in a range, both ends included.

    :param name: what it is, for the error
    :raise ArgumentError: When it is none, or outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ArgumentError(f"{name}: {value!r:.40} is not an integer")
    number = int(value)
    if not least <= number <= most:
        shown = str(number) if number.bit_length() <= 128 else f"a number of {number.bit_length()} bits"
        raise ArgumentError(f"{name}: {shown} is not in {least} to {most}")
    return number


def page_range(name: str, first_page: object, num_pages: object, pages: int) -> tuple[int, int]:
    """A range of a slot's pages.

    :param pages: how many the slot has
    :raise ArgumentError: When one is no integer, or a page is outside the slot.
    """
    first = integer(f"{name}: first page", first_page)
    count = integer(f"{name}: number of pages", num_pages)
    if first + count > pages:
        raise ArgumentError(f"{name}: pages {first} to {first + count} are not all in the slot's {pages}")
    return first, count


def clear_range(
    name: str, first_page: object, num_pages: object, pages: int, words: object
) -> tuple[int, int, Words]:
    """Arguments of KVM_CLEAR_DIRTY_LOG: a range of pages, and their bits; bits past the last page are cleared in a copy.

    :raise ArgumentError: As `page_range`; when the range is empty, does not begin at a multiple of 64, or ends at none and not at
        the slot's end; and when the bits are no bitmap of as many pages.
    """
    first, count = page_range(name, first_page, num_pages, pages)
    if not count:
        raise ArgumentError(f"{name}: there is no page to clear")
    if first % BITS_PER_WORD:
        raise ArgumentError(f"{name}: first page {first} is not a multiple of 64")
    if count % BITS_PER_WORD and first + count != pages:
        raise ArgumentError(f"{name}: {count} pages are neither a multiple of 64 nor up to the slot's end")
    mask = bitmap(name, words, count).copy()
    if count % BITS_PER_WORD:
        mask[-1] &= np.uint64((1 << count % BITS_PER_WORD) - 1)
    return first, count, mask


def bitmap(name: str, words: object, pages: int) -> Words:
    """A bitmap of so many pages, as `Words` are.

    :raise ArgumentError: When it is none.
    """
    if not isinstance(words, np.ndarray):
        raise ArgumentError(f"{name}: a bitmap is an array of numpy's, not a {type(words).__name__}")
    if words.dtype != np.uint64:
        raise ArgumentError(f"{name}: a bitmap's words are of type uint64, not {words.dtype}")
    if words.ndim != 1:
        raise ArgumentError(f"{name}: a bitmap has one dimension, not {words.ndim}")
    if words.size != bitmap_words(pages):
        raise ArgumentError(
            f"{name}: a bitmap of {words.size} words is not one of {pages} pages, {bitmap_words(pages)} words"
        )
    if not words.flags.c_contiguous:
        raise ArgumentError(
            f"{name}: a bitmap's words lie one after the other, not {words.strides[0]} bytes apart"
        )
    return words


def vcpu_index(index: object, existing: int, smp: int) -> int:
    """The number of a vCPU that is to be created: the next.

    :raise HypervisorError: When it is another.
    """
    if integer("vCPU", index) != existing or existing >= smp:
        raise HypervisorError(f"vCPU {index}: the next of {smp} vCPUs has index {existing}")
    return existing


def manual_protect(flags: ManualProtect) -> ManualProtect:
    """Argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.

    :raise ArgumentError: When it has unknown flags, or INITIALLY_SET without ENABLE.
    """
    known = ManualProtect.ENABLE | ManualProtect.INITIALLY_SET
    wanted = ManualProtect(integer("manual protect", flags, int(known)))
    if wanted == ManualProtect.INITIALLY_SET:
        raise ArgumentError("INITIALLY_SET needs ENABLE")
    return wanted
