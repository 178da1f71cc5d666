"""Compiled kernels that make and take apart the records of the ``ram`` section.

Everything here trusts its caller for array sizes, and nobody for the bytes of a stream.
"""

import ctypes
from enum import IntEnum
from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import Late, kernel
from sterna.memory.bitmap import Words
from sterna.memory.content import Bytes, clear, copy, is_zero
from sterna.memory.digest import PIECE_SHIFT
from sterna.stream.wire import XBZRLE_ENCODING, RamFlag
from sterna.stream.xbzrle import coding


class Status(IntEnum):
    """Why compiled code came back. All but MORE and END leave the position at the record's first byte."""

    MORE = 0
    """The bytes at hand end within a record."""
    END = 1
    """The part has ended; the position is after its last record."""
    BLOCK = 2
    """The record names another block than the one given."""
    NO_BLOCK = 3
    """The record continues a block, but there has been none."""
    OUTSIDE = 4
    """The page is not inside the block."""
    FLAGS = 5
    """No record of a page has these flags."""
    FILL = 6
    """A record of a zero page is filled with something else."""
    ENCODING = 7
    """A record of a changed page is not in the XBZRLE encoding, or longer than a page."""
    CODE = 8
    """The XBZRLE code cannot be applied to a page."""
    UNSENT = 9
    """The page is said to have changed, but has not come yet."""
    FULL = 10
    """There is no room for what else there is."""


# Compiled code takes these as constants; an enumeration's members would cost it a lookup.
_MORE, _END, _BLOCK, _NO_BLOCK = int(Status.MORE), int(Status.END), int(Status.BLOCK), int(Status.NO_BLOCK)
_OUTSIDE, _FLAGS, _FILL = int(Status.OUTSIDE), int(Status.FLAGS), int(Status.FILL)
_ENCODING, _CODE, _UNSENT = int(Status.ENCODING), int(Status.CODE), int(Status.UNSENT)
_FULL = int(Status.FULL)
_ZERO, _PAGE, _XBZRLE = int(RamFlag.ZERO), int(RamFlag.PAGE), int(RamFlag.XBZRLE)
_EOS, _CONTINUE = int(RamFlag.EOS), int(RamFlag.CONTINUE)
_apply, _check = coding.apply, coding.check
_PIECE_SHIFT = PIECE_SHIFT


def _big_endian(data: Bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8].tobytes(), "big", signed=True)


big_endian: Any = Late("sterna.jit.intrinsics:big_endian", plain=_big_endian)


def bytes_array(data: bytes) -> NDArray[np.uint8]:
    return np.array(bytearray(data), dtype=np.uint8)


def bytes_at(address: int, size: int) -> bytes:
    """A copy of this process' memory."""
    return ctypes.string_at(address, size)


def record_head(word: int, name: bytes) -> bytes:
    """What a record begins with.

    :param word: offset and flags of its page
    :param name: the block's, its length before it; empty for the block of the record before
    """
    return (word if name else word | _CONTINUE).to_bytes(8, "big") + name


@kernel(ahead=False, inline=True)
def put_head(out: Bytes, used: int, word: int, name: Bytes, named: bool) -> int:
    """Write what `record_head` says.

    :param named: whether the record before is of the same block
    :return: the position after it
    """
    if named:
        word |= _CONTINUE
    for shift in range(8):
        out[used + shift] = np.uint8((word >> (56 - 8 * shift)) & 0xFF)
    used += 8
    if not named:
        for j in range(name.size):
            out[used + j] = name[j]
        used += name.size
    return used


PLAN = np.dtype([(name, np.int64) for name in ("page_bits", "used", "block", "headers")])
"""How records are made: log2 of the stream's page size; bytes that are in `headers` already; addresses of the block's first byte,
and of `headers`.
"""

Plan: TypeAlias = Annotated[NDArray[Any], PLAN]
"""`shape (1,)`"""


@kernel()
def encode_records(
    plan: Plan,
    words: NDArray[np.uint64],
    pages: NDArray[np.int64],
    name: Bytes,
    suffix: Bytes,
    headers: Bytes,
    iov: Annotated[NDArray[np.uint64], 2],
) -> tuple[int, int, int]:
    """Write the headers of pages' records, and the list of pieces that make up the records.

    :param words: the block's bytes as 64-bit words
    :param name: the block's name as the first record carries it, its length before it
    :param suffix: bytes to follow the last record
    :param headers: where headers go, with room for 9 bytes a page, name and suffix
    :param iov: `shape (at least 2 * pages + 1, 2)`
    :return: rows used of `iov`, bytes on the wire, pages that are not zero
    """
    page_bits = plan[0]["page_bits"]
    used = plan[0]["used"]
    hva = plan[0]["block"]
    base = plan[0]["headers"]
    page_bytes = 1 << page_bits
    per_page = page_bytes >> 3
    rows = 0
    run = 0
    normal = 0
    for i in range(pages.size):
        page = pages[i]
        zero = is_zero(words, page * per_page, per_page)
        used = put_head(headers, used, page << page_bits | (_ZERO if zero else _PAGE), name, i > 0)
        if zero:
            headers[used] = 0
            used += 1
        else:
            iov[rows, 0] = base + run
            iov[rows, 1] = used - run
            iov[rows + 1, 0] = hva + page * page_bytes
            iov[rows + 1, 1] = page_bytes
            rows += 2
            run = used
            normal += 1
    for j in range(suffix.size):
        headers[used + j] = suffix[j]
    used += suffix.size
    if used > run:
        iov[rows, 0] = base + run
        iov[rows, 1] = used - run
        rows += 1
    return rows, int(used + normal * page_bytes), normal


ROW = np.dtype([(name, np.int64) for name in ("kind", "page", "at", "body", "size")])
"""A record as `scan` finds it: PAGE, ZERO or XBZRLE; its page's number; and where in the bytes at hand it begins, and what it
carries (the page, the fill byte, the code) begins and how long that is.
"""
ROWS = 512
"""What is found at once: it stays in the processor's first cache."""

Rows: TypeAlias = Annotated[NDArray[Any], ROW]


def new_rows() -> NDArray[Any]:
    """Room for `ROWS` rows."""
    return np.zeros(ROWS, dtype=ROW)


@kernel(ahead=False)
def scan(
    staging: Bytes, at: int, end: int, name: Bytes, page_bits: int, pages: int, rows: Rows
) -> tuple[int, int, int, int]:
    """Find the whole records in `staging[at:end]` that are of one block. What a row says can be done without another look.

    :param name: the block's name; empty when none has been named yet
    :param pages: of the block
    :param rows: where they go, as far as there is room
    :return: how many there are; the position after the last of them; a `Status`; and when the record there is a change of which
        no more can be said, its page, else -1: that it is `UNSENT` comes before that it is cut short or cannot be applied
    """
    page_bytes = 1 << page_bits
    for found in range(rows.size):
        if end - at < 8:
            return found, at, _MORE, -1
        word = big_endian(staging, at)
        if word == _EOS:
            return found, at + 8, _END, -1
        kind = word & (page_bytes - 1) & ~_CONTINUE
        if kind != _PAGE and kind != _ZERO and kind != _XBZRLE:
            return found, at, _FLAGS, -1
        body = at + 8
        if word & _CONTINUE == 0:
            if end - at < 9:
                return found, at, _MORE, -1
            length: Any = np.int64(staging[body])
            if end - at < 9 + length:
                return found, at, _MORE, -1
            if length == 0 or length != name.size:
                return found, at, _BLOCK, -1
            for i in range(length):
                if staging[body + 1 + i] != name[i]:
                    return found, at, _BLOCK, -1
            body += 1 + int(length)
        elif name.size == 0:
            return found, at, _NO_BLOCK, -1
        # An offset past 2**63 is negative here.
        page = word >> page_bits
        if page < 0 or page >= pages:
            return found, at, _OUTSIDE, -1
        size: Any = page_bytes
        if kind == _ZERO:
            size = 1
        elif kind == _XBZRLE:
            size = 3
        if end - body < size:
            return found, at, _MORE, -1
        if kind == _ZERO:
            if staging[body] != 0:
                return found, at, _FILL, -1
        elif kind == _XBZRLE:
            size = int(np.int64(staging[body + 1]) << 8 | np.int64(staging[body + 2]))
            if staging[body] != XBZRLE_ENCODING or size > page_bytes:
                return found, at, _ENCODING, -1
            body += 3
            if end - body < size:
                return found, at, _MORE, page
            if _check(staging[body : body + size], page_bytes)[0] != 0:
                return found, at, _CODE, page
        row = rows[found]
        row["kind"] = kind
        row["page"] = page
        row["at"] = at
        row["body"] = body
        row["size"] = size
        at = body + size
    return rows.size, at, _FULL, -1


RECEIVED = np.dtype([(name, np.int64) for name in ("page_bits", "fresh", "whole", "zero", "changed")])
"""What `apply_records` needs to know of a stream, and counts of it: log2 of its page size; whether pages that have not come are
known to be zero; PAGE, ZERO and XBZRLE records that were applied.
"""

Received: TypeAlias = Annotated[NDArray[Any], RECEIVED]
"""`shape (1,)`"""


def new_received(page_bits: int, fresh: bool) -> NDArray[Any]:
    """Before the first record."""
    return np.array([(page_bits, fresh, 0, 0, 0)], dtype=RECEIVED)


@kernel()
def apply_records(
    staging: Bytes,
    at: int,
    end: int,
    name: Bytes,
    stream: Received,
    ram: Bytes,
    received: Words,
    written: Bytes,
    rows: Rows,
) -> tuple[int, int]:
    """Apply the whole records in `staging[at:end]` to one block.

    :param name: the block's name; empty when none has been named yet
    :param ram: the block's bytes, a multiple of the page size of them
    :param received: a bit for each page that has come
    :param written: a byte for each piece of `ram`, set to 1 after a page there was written
    :param rows: room for what is found
    :return: the position after the last record that was applied, and a `Status`
    """
    page_bits = stream[0]["page_bits"]
    fresh = stream[0]["fresh"] != 0
    page_bytes = 1 << page_bits
    words = ram.view(np.uint64)
    status = _FULL
    while status == _FULL:
        found, at, status, page = scan(staging, at, end, name, page_bits, ram.size >> page_bits, rows)
        whole = 0
        zero = 0
        changed = 0
        for i in range(found):
            row = rows[i]
            number = row["page"]
            body = row["body"]
            offset = number << page_bits
            bit = np.uint64(1) << np.uint64(number & 63)
            if row["kind"] == _PAGE:
                copy(ram[offset : offset + page_bytes], staging[body : body + page_bytes])
                written[offset >> _PIECE_SHIFT] = 1
                whole += 1
            elif row["kind"] == _XBZRLE:
                if received[number >> 6] & bit == 0:
                    at = int(row["at"])
                    page = number
                    break
                _apply(staging[body : body + row["size"]], ram[offset : offset + page_bytes])
                written[offset >> _PIECE_SHIFT] = 1
                changed += 1
            else:
                if not fresh or received[number >> 6] & bit:
                    first = offset >> 3
                    if not is_zero(words, first, page_bytes >> 3):
                        clear(words, first, page_bytes >> 3)
                        written[offset >> _PIECE_SHIFT] = 1
                zero += 1
            received[number >> 6] |= bit
        stream[0]["whole"] += whole
        stream[0]["zero"] += zero
        stream[0]["changed"] += changed
        if page >= 0 and received[page >> 6] & (np.uint64(1) << np.uint64(page & 63)) == 0:
            status = _UNSENT
    return at, status
