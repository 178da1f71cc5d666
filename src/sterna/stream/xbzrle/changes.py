"""Compiled kernel that decides, page by page, what becomes of a batch of dirty pages with an XBZRLE cache, and
its plain twin.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import kernel, plain
from sterna.memory.content import copy, is_zero
from sterna.stream.ram.records import put_head, record_head
from sterna.stream.wire import XBZRLE_ENCODING, RamFlag
from sterna.stream.xbzrle import coding

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]

KEPT_PASSES = 2
"""A page in the cache that was used within so many passes is not displaced by another."""

NORMAL, ZERO, HITS, CODES, CODE_BYTES, MISSES, OVERFLOWS, SPARSE = range(8)
"""What is counted: pages sent whole, pages sent as zero, pages looked up and found in the cache, pages sent as
code, bytes of their records (without the word before each) and of pages that overflowed, pages not found,
pages that overflowed, pages sent as code on zeros.
"""
COUNTERS = 8

CLEAR, HELD, CODED = range(3)
"""How a page is kept: it is zero; it is in the place's memory; or it is short as a code on zeros, and that is kept."""
CODE_ROOM = 64
"""Bytes for such a code, the first two of them its length."""

_ZERO, _PAGE, _XBZRLE = int(RamFlag.ZERO), int(RamFlag.PAGE), int(RamFlag.XBZRLE)
_CODE_HEAD = 3
_SAMPLED = 16
_NORMAL, _ZEROS, _HITS, _CODES, _CODE_BYTES, _MISSES, _OVERFLOWS, _SPARSE = range(8)
_CLEAR, _HELD, _CODED = CLEAR, HELD, CODED
_CODE_START = 2
_apply, _encode = coding.apply, coding.encode


@kernel()
def is_sparse(page: Words) -> bool:
    """Whether a page seems to be zeros for the most part, by a few of its words."""
    step = page.size // _SAMPLED
    found = 0
    for i in range(step // 2, page.size, step):
        if page[i] != np.uint64(0):
            found += 1
    return found <= _SAMPLED // 2


@kernel(ahead=False)
def _kept_page(state: int, kept: Words, short: Bytes, zeros: Words, old: Words) -> Words:
    """A page as it is kept.

    :param kept: the place's memory
    :param short: the place's code
    :param old: room for a page
    """
    if state == _HELD:
        return kept
    if state == _CLEAR:
        return zeros
    for i in range(old.size):
        old[i] = 0
    length = int(short[0]) | int(short[1]) << 8
    _apply(short[_CODE_START : _CODE_START + length], old.view(np.uint8))
    return old


@kernel(ahead=False)
def _keep(page: Words, kept: Words, short: Bytes, zeros: Words, sparse: bool) -> int:
    """Keep a page that is not zero, as a short code if it has one.

    :return: how it is kept
    """
    length = -1
    if sparse and is_sparse(page):
        length = _encode(zeros, page, short[_CODE_START:])
    if length < 0:
        copy(kept, page)
        return _HELD
    short[0] = length & 0xFF
    short[1] = length >> 8
    return _CODED


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
    states: Bytes,
    codes: Bytes,
    age: int,
    keep: bool,
    zeros: Words,
    sparse: bool,
    scratch: Words,
    old: Words,
    counts: Numbers,
    iov: Annotated[Words, 2],
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
        enters = not hit and keep and (keys[slot] == 0 or ages[slot] + KEPT_PASSES <= age)
        source, kinds, code = hva + page * size, [_PAGE], b""
        scratch[:] = guest
        if hit or enters:
            keys[slot], ages[slot] = key, age
        short = codes[slot * CODE_ROOM : (slot + 1) * CODE_ROOM]
        before = plain(_kept_page)(int(states[slot]), kept, short, zeros, old)
        if not scratch.any():
            kinds = [_ZERO]
            counts[ZERO] += 1
            if (hit and keep) or enters:
                states[slot] = CLEAR
        else:
            target, length = np.empty(size, dtype=np.uint8), coding.OVERFLOW
            if hit:
                counts[HITS] += 1
                length = plain(coding.encode)(before, scratch, target)
                if length == coding.UNCHANGED:
                    continue
                if length == coding.OVERFLOW:
                    counts[OVERFLOWS] += 1
                    counts[CODE_BYTES] += size
                else:
                    kinds = [_XBZRLE]
            else:
                counts[MISSES] += 1
                if sparse and plain(is_sparse)(scratch):
                    target = target[: size // 2]
                    length = plain(coding.encode)(zeros, scratch, target)
                    if length != coding.OVERFLOW:
                        kinds = [_ZERO, _XBZRLE]
                        counts[SPARSE] += 1
            if length != coding.OVERFLOW:
                code = bytes((XBZRLE_ENCODING, *length.to_bytes(2, "big"))) + target[:length].tobytes()
                if hit:
                    counts[CODES] += 1
                    counts[CODE_BYTES] += len(code) + (0 if named else name.size)
            if (hit and keep) or enters:
                if length == coding.OVERFLOW or (hit and states[slot] == HELD):
                    kept[:] = scratch
                    states[slot] = HELD
                    source = cache_hva + slot * size
                else:
                    states[slot] = plain(_keep)(scratch, kept, short, zeros, sparse)
        if kinds == [_PAGE] and apart.size:
            counts[NORMAL] += 1
            apart[len(rows)] = page
            rows.append((source, size))
            continue
        for kind in kinds:
            record = record_head(page << page_bits | kind, b"" if named else name.tobytes())
            record += b"\0" if kind == _ZERO else code
            named = True
            out[used : used + len(record)] = bytearray(record)
            used += len(record)
        if kinds == [_PAGE]:
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
    states: Bytes,
    codes: Bytes,
    age: int,
    keep: bool,
    zeros: Words,
    sparse: bool,
    scratch: Words,
    old: Words,
    counts: Numbers,
    iov: Annotated[Words, 2],
    apart: Numbers,
) -> tuple[int, int]:
    """Write the records of dirty pages, and the list of pieces that make them up.

    A page is read once, as the guest may be writing to it: what is compared, sent and kept comes from that one
    copy. A page that is sent whole and kept is sent from where it is kept.

    :param words: the block's bytes as 64-bit words
    :param pages: numbers in the block, in the stream's page size
    :param first_key: number of the block's first page among the pages of all blocks, from 1
    :param name: the block's name as the first record carries it, its length before it
    :param suffix: bytes to follow the last record
    :param out: where all but whole pages goes, with `used` bytes in it already, and room for 20 bytes and one
        page for each page, name and suffix
    :param addresses: of the block's first byte, of `out`, and of `cached`
    :param cached: the pages in the cache; how many is a power of two
    :param keys: which page is in each place, from 1; 0 is none
    :param ages: number of the pass in which it was last used
    :param states: `CLEAR`, `HELD` or `CODED`; only a page that is held takes memory of `cached`
    :param codes: `CODE_ROOM` bytes for each place
    :param age: number of this pass
    :param keep: whether the cache is kept up to date; not in the last pass, nor when nothing is sent
    :param zeros: a page of zeros
    :param sparse: whether a page that is not in the cache, and seems to be zeros for the most part, goes as a zero record and
        what differs from that
    :param scratch: room for one page
    :param old: room for another
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
        enters = not hit and keep and (keys[slot] == 0 or ages[slot] + KEPT_PASSES <= age)
        guest = words[page * per_page : (page + 1) * per_page]
        kept = cached[slot * per_page : (slot + 1) * per_page]
        source = addresses[0] + np.uint64(page * size)
        length = -1
        flags = _PAGE
        if hit or enters:
            keys[slot] = key
            ages[slot] = age
        short = codes[slot * CODE_ROOM : (slot + 1) * CODE_ROOM]
        # Room for the record before, which says that the page is zero.
        head = used + 8 + (0 if named else name.size) + (0 if hit else 9)
        code = out[head + _CODE_HEAD : head + _CODE_HEAD + size]
        if hit:
            copy(scratch, guest)
            if is_zero(scratch, 0, per_page):
                flags = _ZERO
                if keep:
                    states[slot] = _CLEAR
            else:
                counts[_HITS] += 1
                held = states[slot] == _HELD
                length = _encode(_kept_page(states[slot], kept, short, zeros, old), scratch, code)
                if length == 0:
                    continue
                if length < 0:
                    counts[_OVERFLOWS] += 1
                    counts[_CODE_BYTES] += size
                else:
                    flags = _XBZRLE
                    counts[_CODES] += 1
                    counts[_CODE_BYTES] += head - used - 8 + _CODE_HEAD + length
                if keep:
                    if length < 0:
                        copy(kept, scratch)
                        states[slot] = _HELD
                        source = addresses[2] + np.uint64(slot * size)
                    elif held:
                        # From the code rather than the copy: little is written, and it is what the peer does.
                        _apply(code[:length], kept.view(np.uint8))
                    else:
                        states[slot] = _keep(scratch, kept, short, zeros, sparse)
        elif is_zero(guest, 0, per_page):
            flags = _ZERO
            if enters:
                states[slot] = _CLEAR
        else:
            counts[_MISSES] += 1
            if sparse and is_sparse(guest):
                copy(scratch, guest)
                length = _encode(zeros, scratch, code[: size >> 1])
                if length > 0:
                    flags = _XBZRLE
                    counts[_SPARSE] += 1
            if length == 0:
                flags = _ZERO  # the guest has just cleared it
                counts[_MISSES] -= 1
                if enters:
                    states[slot] = _CLEAR
            elif enters and length > 0:
                states[slot] = _keep(scratch, kept, short, zeros, sparse)
            elif enters:
                copy(kept, guest)
                states[slot] = _HELD
                source = addresses[2] + np.uint64(slot * size)
        if flags == _PAGE and apart.size:
            counts[_NORMAL] += 1
            apart[rows] = page
            iov[rows, 0] = source
            iov[rows, 1] = size
            rows += 1
            continue
        if flags == _ZERO or (flags == _XBZRLE and not hit):
            used = put_head(out, used, page << page_bits | _ZERO, name, named)
            named = True
            out[used] = 0
            used += 1
        if flags == _ZERO:
            counts[_ZEROS] += 1
            continue
        used = put_head(out, used, page << page_bits | flags, name, named)
        named = True
        if flags == _XBZRLE:
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
