"""Compiled kernel that decides, page by page, what becomes of a batch of dirty pages with an XBZRLE cache."""

from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import kernel
from sterna.memory.bitmap import PageNumbers, Words
from sterna.memory.content import Bytes, clear, copy, is_zero
from sterna.stream.ram.records import put_head
from sterna.stream.wire import XBZRLE_ENCODING, RamFlag
from sterna.stream.xbzrle import coding

KEPT_PASSES = 2
"""A page in the cache that was used within so many passes is not displaced by another."""

BATCH = np.dtype(
    [
        (name, np.int64)
        for name in (
            # Number of the block's first page among the pages of all blocks, from 1.
            "first_key",
            "page_bits",
            # Bytes that are in `out` already.
            "used",
            # Addresses of the block's first byte, of `out`, and of `cached`.
            "block",
            "out",
            "cached",
            # Number of this pass.
            "age",
            # Whether the cache is kept up to date; not in the last pass, nor when nothing is sent.
            "keep",
            # Whether a page that is not in the cache, and seems to be zeros for the most part, goes as a zero record and what
            # differs from that.
            "sparse",
        )
    ]
)
"""What becomes of pages depends on it beside them."""
COUNTED = np.dtype(
    [
        (name, np.int64)
        for name in (
            # Pages sent whole, or as zero; looked up and found in the cache, or not found.
            "normal",
            "zero",
            "hits",
            "misses",
            # Pages sent as code, bytes of their records (without the word before each) and of pages that overflowed, which are
            # counted too; pages sent as code on zeros.
            "codes",
            "code_bytes",
            "overflows",
            "sparse",
        )
    ]
)
PLACE = np.dtype([("key", np.int64), ("age", np.int32), ("state", np.int32)])
"""A place of the cache: which page it has, from 1, 0 for none; number of the pass in which that was last used; `CLEAR`, `HELD` or
`CODED`: only a page that is held takes memory of `cached`.
"""

BatchRecord: TypeAlias = Annotated[NDArray[Any], BATCH]
"""`shape (1,)`"""
Counted: TypeAlias = Annotated[NDArray[Any], COUNTED]
"""`shape (1,)`"""
Places: TypeAlias = Annotated[NDArray[Any], PLACE]

CLEAR, HELD, CODED = range(3)
"""How a page is kept: it is zero; it is in the place's memory; or it is short as a code on zeros, and that is kept."""
CODE_ROOM = 64
"""Bytes for such a code, the first two of them its length."""

_ZERO, _PAGE, _XBZRLE = int(RamFlag.ZERO), int(RamFlag.PAGE), int(RamFlag.XBZRLE)
_CODE_HEAD = 3
_SAMPLED = 16
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
    clear(old, 0, old.size)
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


@kernel()
def encode_changes(
    batch: BatchRecord,
    words: Words,
    pages: PageNumbers,
    name: Bytes,
    suffix: Bytes,
    out: Bytes,
    cached: Words,
    places: Places,
    codes: Bytes,
    scratch: Annotated[Words, 2],
    counts: Counted,
    iov: Annotated[Words, 2],
    apart: PageNumbers,
) -> tuple[int, int]:
    """Write the records of dirty pages, and the list of pieces that make them up.

    A page is read once, as the guest may be writing to it: what is compared, sent and kept comes from that one
    copy. A page that is sent whole and kept is sent from where it is kept.

    :param words: the block's bytes as 64-bit words
    :param pages: numbers in the block, in the stream's page size
    :param name: the block's name as the first record carries it, its length before it
    :param suffix: bytes to follow the last record
    :param out: where all but whole pages goes, with room for 20 bytes and one page for each page, name and suffix
    :param cached: the pages in the cache
    :param places: of the cache; how many is a power of two
    :param codes: `CODE_ROOM` bytes for each place
    :param scratch: a page of zeros, and room for two more
    :param counts: increased
    :param iov: `shape (at least 2 * pages + 1, 2)`
    :param apart: empty, or as long as `pages`: then pages that are sent whole have no records, their numbers go here, and only
        they are in `iov`
    :return: rows used of `iov`, bytes on the wire without pages that go apart
    """
    first_key = batch[0]["first_key"]
    page_bits = batch[0]["page_bits"]
    used = batch[0]["used"]
    age = batch[0]["age"]
    keep = batch[0]["keep"] != 0
    sparse = batch[0]["sparse"] != 0
    zeros = scratch[0]
    fresh = scratch[1]
    old = scratch[2]
    size = 1 << page_bits
    per_page = size >> 3
    mask = places.size - 1
    rows = 0
    run = 0
    whole = 0
    named = False
    for i in range(pages.size):
        page = pages[i]
        key = first_key + page
        slot = key & mask
        place = places[slot]
        hit = place["key"] == key
        enters = not hit and keep and (place["key"] == 0 or place["age"] + KEPT_PASSES <= age)
        guest = words[page * per_page : (page + 1) * per_page]
        kept = cached[slot * per_page : (slot + 1) * per_page]
        source = batch[0]["block"] + page * size
        length = -1
        flags = _PAGE
        if hit or enters:
            place["key"] = key
            place["age"] = age
        short = codes[slot * CODE_ROOM : (slot + 1) * CODE_ROOM]
        # Room for the record before, which says that the page is zero.
        head = used + 8 + (0 if named else name.size) + (0 if hit else 9)
        code = out[head + _CODE_HEAD : head + _CODE_HEAD + size]
        if hit:
            copy(fresh, guest)
            if is_zero(fresh, 0, per_page):
                flags = _ZERO
                if keep:
                    place["state"] = _CLEAR
            else:
                counts[0]["hits"] += 1
                held = place["state"] == _HELD
                length = _encode(_kept_page(place["state"], kept, short, zeros, old), fresh, code)
                if length == 0:
                    continue
                if length < 0:
                    counts[0]["overflows"] += 1
                    counts[0]["code_bytes"] += size
                else:
                    flags = _XBZRLE
                    counts[0]["codes"] += 1
                    counts[0]["code_bytes"] += head - used - 8 + _CODE_HEAD + length
                if keep:
                    if length < 0:
                        copy(kept, fresh)
                        place["state"] = _HELD
                        source = batch[0]["cached"] + slot * size
                    elif held:
                        # From the code rather than the copy: little is written, and it is what the peer does.
                        _apply(code[:length], kept.view(np.uint8))
                    else:
                        place["state"] = _keep(fresh, kept, short, zeros, sparse)
        elif is_zero(guest, 0, per_page):
            flags = _ZERO
            if enters:
                place["state"] = _CLEAR
        else:
            counts[0]["misses"] += 1
            if sparse and is_sparse(guest):
                copy(fresh, guest)
                length = _encode(zeros, fresh, code[: size >> 1])
                if length > 0:
                    flags = _XBZRLE
                    counts[0]["sparse"] += 1
            if length == 0:
                flags = _ZERO  # the guest has just cleared it
                counts[0]["misses"] -= 1
                if enters:
                    place["state"] = _CLEAR
            elif enters and length > 0:
                place["state"] = _keep(fresh, kept, short, zeros, sparse)
            elif enters:
                copy(kept, guest)
                place["state"] = _HELD
                source = batch[0]["cached"] + slot * size
        if flags == _PAGE and apart.size:
            counts[0]["normal"] += 1
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
            counts[0]["zero"] += 1
            continue
        used = put_head(out, used, page << page_bits | flags, name, named)
        named = True
        if flags == _XBZRLE:
            out[used] = XBZRLE_ENCODING
            out[used + 1] = length >> 8
            out[used + 2] = length & 0xFF
            used += _CODE_HEAD + length
        else:
            counts[0]["normal"] += 1
            whole += size
            iov[rows, 0] = batch[0]["out"] + run
            iov[rows, 1] = used - run
            iov[rows + 1, 0] = source
            iov[rows + 1, 1] = size
            rows += 2
            run = used
    for j in range(suffix.size):
        out[used + j] = suffix[j]
    used += suffix.size
    if used > run and apart.size == 0:
        iov[rows, 0] = batch[0]["out"] + run
        iov[rows, 1] = used - run
        rows += 1
    return rows, int(used + whole)
