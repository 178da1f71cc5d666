"""Compiled kernel that decides, page by page, what becomes of a batch of dirty pages with an XBZRLE cache, and
its plain twin.
"""

import numpy as np
from numpy.typing import NDArray

from sterna.memory.kernel import kernel
from sterna.stream import xbzrle
from sterna.stream.wire import XBZRLE_ENCODING, RamFlag

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]

KEPT_PASSES = 2
"""A page in the cache that was used within so many passes is not displaced by another."""

NORMAL, ZERO, HITS, CODES, CODE_BYTES, MISSES, OVERFLOWS = range(7)
"""What is counted: pages sent whole, pages sent as zero, pages looked up and found in the cache, pages sent as
code, bytes of their records (without the word before each) and of pages that overflowed, pages not found,
pages that overflowed.
"""
COUNTERS = 7

_ZERO, _PAGE, _XBZRLE, _CONTINUE = (
    int(RamFlag.ZERO),
    int(RamFlag.PAGE),
    int(RamFlag.XBZRLE),
    int(RamFlag.CONTINUE),
)
_CODE_HEAD = 3
_NORMAL, _ZEROS, _HITS, _CODES, _CODE_BYTES, _MISSES, _OVERFLOWS = range(7)
_apply, _encode = xbzrle.apply, xbzrle.encode


def encode_changes_twin(
    words: Words,
    pages: Numbers,
    first_key: int,
    page_bits: int,
    name: Bytes,
    suffix: Bytes,
    out: Bytes,
    used: int,
    addresses: Words,
    cached: Words,
    keys: Numbers,
    ages: Numbers,
    age: int,
    keep: bool,
    scratch: Words,
    counts: Numbers,
    iov: Words,
    apart: Numbers,
) -> tuple[int, int]:
    hva, base, cache_hva = (int(address) for address in addresses)
    size = 1 << page_bits
    rows: list[tuple[int, int]] = []
    run, named = 0, False
    page_bytes = 0
    for page in pages.tolist():
        key = first_key + page
        slot = key & (keys.size - 1)
        kept = cached[slot * size // 8 : (slot + 1) * size // 8]
        guest = words[page * size // 8 : (page + 1) * size // 8]
        hit = keys[slot] == key
        enters = not hit and keep and (keys[slot] < 0 or ages[slot] + KEPT_PASSES <= age)
        source, flags, code = hva + page * size, _PAGE, b""
        scratch[:] = guest
        if hit or enters:
            keys[slot], ages[slot] = key, age
        if not scratch.any():
            flags = _ZERO
            counts[ZERO] += 1
            if hit or enters:
                kept[:] = 0
        elif hit:
            counts[HITS] += 1
            target = np.empty(size, dtype=np.uint8)
            length = xbzrle.encode.twin(kept, scratch, target)  # type: ignore[attr-defined]
            if length == xbzrle.UNCHANGED:
                continue
            if length == xbzrle.OVERFLOW:
                counts[OVERFLOWS] += 1
                counts[CODE_BYTES] += size
            else:
                flags = _XBZRLE
                code = bytes((XBZRLE_ENCODING, *length.to_bytes(2, "big"))) + target[:length].tobytes()
                counts[CODES] += 1
                counts[CODE_BYTES] += len(code) + (0 if named else name.size)
            if keep:
                kept[:] = scratch
                source = cache_hva + slot * size
        else:
            counts[MISSES] += 1
            if enters:
                kept[:] = scratch
                source = cache_hva + slot * size
        if flags == _PAGE and apart.size:
            counts[NORMAL] += 1
            apart[len(rows)] = page
            rows.append((source, size))
            continue
        head = (page << page_bits | flags | (_CONTINUE if named else 0)).to_bytes(8, "big")
        record = head + (b"" if named else name.tobytes()) + (b"\0" if flags == _ZERO else b"") + code
        named = True
        out[used : used + len(record)] = bytearray(record)
        used += len(record)
        if flags == _PAGE:
            counts[NORMAL] += 1
            page_bytes += size
            rows += [(base + run, used - run), (source, size)]
            run = used
    out[used : used + suffix.size] = suffix
    used += suffix.size
    if used > run and not apart.size:
        rows.append((base + run, used - run))
    iov[: len(rows)] = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    return len(rows), used + page_bytes


def _copy_twin(target: Words, source: Words) -> None:
    target[:] = source


@kernel(twin=_copy_twin)
def _copy(target: Words, source: Words) -> None:
    for i in range(target.size):
        target[i] = source[i]


def _is_zero_twin(words: Words) -> bool:
    return not words.any()


@kernel(twin=_is_zero_twin)
def _is_zero(words: Words) -> bool:
    for group in range(0, words.size, 8):
        seen = words[group]
        for j in range(1, 8):
            seen |= words[group + j]
        if seen != np.uint64(0):
            return False
    return True


@kernel(twin=encode_changes_twin)
def encode_changes(
    words: Words,
    pages: Numbers,
    first_key: int,
    page_bits: int,
    name: Bytes,
    suffix: Bytes,
    out: Bytes,
    used: int,
    addresses: Words,
    cached: Words,
    keys: Numbers,
    ages: Numbers,
    age: int,
    keep: bool,
    scratch: Words,
    counts: Numbers,
    iov: Words,
    apart: Numbers,
) -> tuple[int, int]:
    """Write the records of dirty pages, and the list of pieces that make them up.

    A page is read once, as the guest may be writing to it: what is compared, sent and kept comes from that one
    copy. A page that is sent whole and kept is sent from where it is kept.

    :param words: the block's bytes as 64-bit words
    :param pages: numbers in the block, in the stream's page size
    :param first_key: number of the block's first page among the pages of all blocks
    :param name: the block's name as the first record carries it, its length before it
    :param suffix: bytes to follow the last record
    :param out: where all but whole pages goes, with `used` bytes in it already, and room for 11 bytes and one
        page for each page, name and suffix
    :param addresses: of the block's first byte, of `out`, and of `cached`
    :param cached: the pages in the cache; how many is a power of two
    :param keys: which page is in each place; -1 is none
    :param ages: number of the pass in which it was last used
    :param age: number of this pass
    :param keep: whether the cache is kept up to date; not in the last pass
    :param scratch: room for one page
    :param counts: `COUNTERS` counters, increased
    :param iov: `shape (at least 2 * pages + 1, 2)`
    :param apart: empty, or as long as `pages`: then pages that are sent whole have no records, their numbers go here, and only
        they are in `iov`
    :return: rows used of `iov`, bytes on the wire without pages that go apart
    """
    size = 1 << page_bits
    per_page = size >> 3
    mask = keys.size - 1
    rows = 0
    run = 0
    whole = 0
    named = False
    for i in range(pages.size):
        page = pages[i]
        key = first_key + page
        slot = key & mask
        hit = keys[slot] == key
        enters = not hit and keep and (keys[slot] < 0 or ages[slot] + KEPT_PASSES <= age)
        guest = words[page * per_page : (page + 1) * per_page]
        kept = cached[slot * per_page : (slot + 1) * per_page]
        source = addresses[0] + np.uint64(page * size)
        length = 0
        flags = _PAGE
        head = used + 8 + (0 if named else name.size)
        if hit or enters:
            keys[slot] = key
            ages[slot] = age
        if hit:
            _copy(scratch, guest)
            if _is_zero(scratch):
                flags = _ZERO
                _copy(kept, scratch)
            else:
                counts[_HITS] += 1
                code = out[head + _CODE_HEAD : head + _CODE_HEAD + size]
                length = _encode(kept, scratch, code)
                if length == 0:
                    continue
                if length < 0:
                    counts[_OVERFLOWS] += 1
                    counts[_CODE_BYTES] += size
                    if keep:
                        _copy(kept, scratch)
                        source = addresses[2] + np.uint64(slot * size)
                else:
                    flags = _XBZRLE
                    counts[_CODES] += 1
                    counts[_CODE_BYTES] += head - used - 8 + _CODE_HEAD + length
                    if keep:
                        # From the code rather than the copy: little is written, and it is what the peer does.
                        _apply(code[:length], kept.view(np.uint8))
        elif _is_zero(guest):
            flags = _ZERO
            if enters:
                kept[:] = 0
        else:
            counts[_MISSES] += 1
            if enters:
                _copy(kept, guest)
                source = addresses[2] + np.uint64(slot * size)
        if flags == _PAGE and apart.size:
            counts[_NORMAL] += 1
            apart[rows] = page
            iov[rows, 0] = source
            iov[rows, 1] = size
            rows += 1
            continue
        word = (page << page_bits) | flags | (_CONTINUE if named else 0)
        for shift in range(8):
            out[used + shift] = np.uint8((word >> (56 - 8 * shift)) & 0xFF)
        used += 8
        if not named:
            named = True
            for j in range(name.size):
                out[used + j] = name[j]
            used += name.size
        if flags == _ZERO:
            counts[_ZEROS] += 1
            out[used] = 0
            used += 1
        elif flags == _XBZRLE:
            out[used] = XBZRLE_ENCODING
            out[used + 1] = length >> 8
            out[used + 2] = length & 0xFF
            used += _CODE_HEAD + length
        else:
            counts[_NORMAL] += 1
            whole += size
            iov[rows, 0] = addresses[1] + np.uint64(run)
            iov[rows, 1] = used - run
            iov[rows + 1, 0] = source
            iov[rows + 1, 1] = size
            rows += 2
            run = used
    for j in range(suffix.size):
        out[used + j] = suffix[j]
    used += suffix.size
    if used > run and apart.size == 0:
        iov[rows, 0] = addresses[1] + np.uint64(run)
        iov[rows, 1] = used - run
        rows += 1
    return rows, used + whole
