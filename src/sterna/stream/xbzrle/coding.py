"""XBZRLE: a page as what differs from the version of it that was sent before.

The code is a sequence of pairs: how many bytes stay as they are, and how many follow that replace the next
ones. Both numbers are unsigned LEB128 of at most 14 bits, low bits first. Runs are as long as can be, so
each page has one code; what stays the same at the page's end is left out. The first run of unchanged bytes may
have length 0, no other run may. A code holds the *new* bytes: applying it twice does no harm.

Source: QEMU's ``docs/xbzrle.txt``, and the behaviour of release 7.2, whose codes come out byte for byte.
"""

from enum import IntEnum

import numpy as np

from sterna.jit.kernel import kernel
from sterna.memory.bitmap import Words
from sterna.memory.content import Bytes, copy

UNCHANGED = 0
"""What `encode` returns for two equal pages: there is nothing to send."""
OVERFLOW = -1
"""What `encode` returns when the code does not fit: the page is better sent as it is."""

_LENGTH_BYTES = 2


class CodeFault(IntEnum):
    """What is wrong with a code."""

    NONE = 0
    EMPTY = 1
    """It has no bytes; a page that did not change is not sent."""
    CUT = 2
    """It ends within a pair."""
    LONG = 3
    """A run's length has more than 14 bits."""
    NO_RUN = 4
    """A run other than the first is empty."""
    OUTSIDE = 5
    """A run ends past the page."""

    @property
    def text(self) -> str:
        return _TEXTS[self]


_TEXTS = {
    CodeFault.NONE: "nothing is wrong",
    CodeFault.EMPTY: "it is empty",
    CodeFault.CUT: "it is cut short",
    CodeFault.LONG: "a run's length has more than 14 bits",
    CodeFault.NO_RUN: "a run of no bytes",
    CodeFault.OUTSIDE: "a run ends past the page",
}

# Compiled code takes these as constants; an enumeration's members would cost it a lookup.
_NONE, _EMPTY, _CUT = int(CodeFault.NONE), int(CodeFault.EMPTY), int(CodeFault.CUT)
_LONG, _NO_RUN, _OUTSIDE = int(CodeFault.LONG), int(CodeFault.NO_RUN), int(CodeFault.OUTSIDE)
_ONES = 0x0101010101010101
_TOPS = 0x8080808080808080


@kernel(ahead=False)
def _put_length(out: Bytes, used: int, length: int) -> int:
    if length < 0x80:
        out[used] = length
        return used + 1
    out[used] = length & 0x7F | 0x80
    out[used + 1] = length >> 7
    return used + 2


def _encode_twin(old: Words, new: Words, out: Bytes) -> int:
    before, after = old.view(np.uint8), new.view(np.uint8)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], before != after, [False]))))
    used = at = 0
    for start, end in edges.reshape(-1, 2).tolist():
        for length in (start - at, end - start):
            if used + _LENGTH_BYTES > out.size:
                return OVERFLOW
            used = _put_length(out, used, length)
        if used + end - start > out.size:
            return OVERFLOW
        out[used : used + end - start] = after[start:end]
        used += end - start
        at = end
    return OVERFLOW if at < after.size and used + _LENGTH_BYTES > out.size else used


@kernel(twin=_encode_twin, ahead=False)
def encode(old: Words, new: Words, out: Bytes) -> int:
    """Encode what changed from one version of a page to the next.

    Room for two more bytes is asked for before the search for a further change, as QEMU does: a code may
    overflow although it would just have fitted.

    :param old: the page as it was sent last, as 64-bit words
    :param new: the page now, of the same size, at most 16 KiB; nobody may be writing to it
    :param out: where the code goes; its size is the most it may take
    :return: bytes of the code, `UNCHANGED` or `OVERFLOW`
    """
    before = old.view(np.uint8)
    after = new.view(np.uint8)
    size = after.size
    words = new.size
    used = 0
    at = 0
    while at < size:
        if used + _LENGTH_BYTES > out.size:
            return OVERFLOW
        start = at
        while at & 7 and before[at] == after[at]:
            at += 1
        if at & 7 == 0:
            group = at >> 3
            # Eight words at a time become vector code.
            while group + 8 <= words:
                seen = old[group] ^ new[group]
                for i in range(1, 8):
                    seen |= old[group + i] ^ new[group + i]
                if seen != np.uint64(0):
                    break
                group += 8
            while group < words and old[group] == new[group]:
                group += 1
            at = group << 3
            while at < size and before[at] == after[at]:
                at += 1
        if at == size:
            return used
        used = _put_length(out, used, at - start)
        if used + _LENGTH_BYTES > out.size:
            return OVERFLOW
        start = at
        while at & 7 and before[at] != after[at]:
            at += 1
        if at & 7 == 0:
            group = at >> 3
            while group < words:
                different = old[group] ^ new[group]
                # Not zero when a byte of the word is (with false positives only above such a byte).
                if (different - np.uint64(_ONES)) & ~different & np.uint64(_TOPS):
                    break
                group += 1
            at = group << 3
            while at < size and before[at] != after[at]:
                at += 1
        used = _put_length(out, used, at - start)
        if used + at - start > out.size:
            return OVERFLOW
        for i in range(at - start):
            out[used + i] = after[start + i]
        used += at - start
    return used


@kernel()
def check(code: Bytes, page_bytes: int) -> tuple[int, int]:
    """Whether a code can be applied to a page of so many bytes.

    :return: a `CodeFault`, and where in the code it is: the first byte of a run's length
    """
    size = code.size
    if size == 0:
        return _EMPTY, 0
    at = 0
    target = 0
    unchanged = True
    while at < size or not unchanged:
        first = at
        if at >= size:
            return _CUT, first
        length = int(code[at])
        at += 1
        if length & 0x80:
            if at >= size:
                return _CUT, first
            more = int(code[at])
            at += 1
            if more & 0x80:
                return _LONG, first
            length = length & 0x7F | more << 7
        if length == 0 and (first > 0 or not unchanged):
            return _NO_RUN, first
        target += length
        if target > page_bytes:
            return _OUTSIDE, first
        if not unchanged:
            if length > size - at:
                return _CUT, first
            at += length
        unchanged = not unchanged
    return _NONE, at


@kernel(ahead=False)
def apply(code: Bytes, page: Bytes) -> None:
    """Apply a code that `check` found good for a page of this size, or that `encode` made."""
    at = 0
    target = 0
    unchanged = True
    while at < code.size:
        length = int(code[at])
        at += 1
        if length & 0x80:
            length = length & 0x7F | int(code[at]) << 7
            at += 1
        if not unchanged:
            copy(page[target : target + length], code[at : at + length])
            at += length
        target += length
        unchanged = not unchanged
