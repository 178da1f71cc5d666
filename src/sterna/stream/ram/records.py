"""Compiled kernels that make and take apart the records of the ``ram`` section, and their plain twins.

Everything here trusts its caller for array sizes, and nobody for the bytes of a stream.
"""

import ctypes
from enum import IntEnum
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import kernel
from sterna.memory.bitmap import Words
from sterna.memory.digest import PIECE_SHIFT
from sterna.stream.wire import XBZRLE_ENCODING, RamFlag
from sterna.stream.xbzrle import coding

Bytes = NDArray[np.uint8]


class Status(IntEnum):
    """Why `decode_records` came back. All but MORE and END leave the position at the record's first byte."""

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


# Compiled code takes these as constants; an enumeration's members would cost it a lookup.
_MORE, _END, _BLOCK, _NO_BLOCK = int(Status.MORE), int(Status.END), int(Status.BLOCK), int(Status.NO_BLOCK)
_OUTSIDE, _FLAGS, _FILL = int(Status.OUTSIDE), int(Status.FLAGS), int(Status.FILL)
_ENCODING, _CODE, _UNSENT = int(Status.ENCODING), int(Status.CODE), int(Status.UNSENT)
_ZERO, _PAGE, _XBZRLE = int(RamFlag.ZERO), int(RamFlag.PAGE), int(RamFlag.XBZRLE)
_EOS, _CONTINUE = int(RamFlag.EOS), int(RamFlag.CONTINUE)
_apply, _check = coding.apply, coding.check
_PIECE_SHIFT = PIECE_SHIFT


def bytes_array(data: bytes) -> NDArray[np.uint8]:
    return np.array(bytearray(data), dtype=np.uint8)


def bytes_at(address: int, size: int) -> bytes:
    """A copy of this process' memory."""
    return ctypes.string_at(address, size)


@kernel(ahead=False)
def is_zero(words: Words, first: int, count: int) -> bool:
    """Whether all of `count` words from `first` on are zero.

    :param count: a multiple of 8
    """
    # Eight words at a time become vector code.
    for group in range(first, first + count, 8):
        seen = words[group]
        for j in range(1, 8):
            seen |= words[group + j]
        if seen != np.uint64(0):
            return False
    return True


def record_head(word: int, name: bytes) -> bytes:
    """What a record begins with.

    :param word: offset and flags of its page
    :param name: the block's, its length before it; empty for the block of the record before
    """
    return (word if name else word | _CONTINUE).to_bytes(8, "big") + name


@kernel(ahead=False)
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


def _encode_twin(
    words: NDArray[np.uint64],
    pages: NDArray[np.int64],
    page_bits: int,
    name: Bytes,
    suffix: Bytes,
    headers: Bytes,
    used: int,
    addresses: NDArray[np.uint64],
    iov: Annotated[NDArray[np.uint64], 2],
) -> tuple[int, int, int]:
    hva, base = (int(address) for address in addresses)
    page_bytes = 1 << page_bits
    rows: list[tuple[int, int]] = []
    run = normal = 0
    for i, page in enumerate(pages.tolist()):
        zero = not words[page * page_bytes // 8 : (page + 1) * page_bytes // 8].any()
        record = record_head(page << page_bits | (_ZERO if zero else _PAGE), b"" if i else name.tobytes())
        record += b"\0" if zero else b""
        headers[used : used + len(record)] = np.frombuffer(record, dtype=np.uint8)
        used += len(record)
        if not zero:
            rows += [(base + run, used - run), (hva + page * page_bytes, page_bytes)]
            run = used
            normal += 1
    headers[used : used + suffix.size] = suffix
    used += suffix.size
    if used > run:
        rows.append((base + run, used - run))
    iov[: len(rows)] = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    return len(rows), used + normal * page_bytes, normal


@kernel(twin=_encode_twin)
def encode_records(
    words: NDArray[np.uint64],
    pages: NDArray[np.int64],
    page_bits: int,
    name: Bytes,
    suffix: Bytes,
    headers: Bytes,
    used: int,
    addresses: NDArray[np.uint64],
    iov: Annotated[NDArray[np.uint64], 2],
) -> tuple[int, int, int]:
    """Write the headers of pages' records, and the list of pieces that make up the records.

    :param words: the block's bytes as 64-bit words
    :param name: the block's name as the first record carries it, its length before it
    :param suffix: bytes to follow the last record
    :param headers: where headers go, with `used` bytes in it already, and room for 9 bytes a page, name and
        suffix
    :param addresses: of the block's first byte, and of `headers`
    :param iov: `shape (at least 2 * pages + 1, 2)`
    :return: rows used of `iov`, bytes on the wire, pages that are not zero
    """
    page_bytes = 1 << page_bits
    per_page = page_bytes >> 3
    hva = addresses[0]
    base = addresses[1]
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
            iov[rows, 0] = base + np.uint64(run)
            iov[rows, 1] = used - run
            iov[rows + 1, 0] = hva + np.uint64(page * page_bytes)
            iov[rows + 1, 1] = page_bytes
            rows += 2
            run = used
            normal += 1
    for j in range(suffix.size):
        headers[used + j] = suffix[j]
    used += suffix.size
    if used > run:
        iov[rows, 0] = base + np.uint64(run)
        iov[rows, 1] = used - run
        rows += 1
    return rows, used + normal * page_bytes, normal


def _copy_twin(target: Bytes, data: Bytes) -> None:
    target[:] = data


@kernel(twin=_copy_twin, ahead=False)
def copy(target: Bytes, data: Bytes) -> None:
    """Copy bytes; both arrays have the same size."""
    # A loop that starts at zero becomes vector code; numba's own copy of slices is five times slower.
    for i in range(target.size):
        target[i] = data[i]


def _decode_twin(
    staging: Bytes,
    at: int,
    end: int,
    name: Bytes,
    ram: Bytes,
    page_bits: int,
    received: Words,
    written: Bytes,
    fresh: bool,
    counts: NDArray[np.int64],
) -> tuple[int, int]:
    page_bytes = 1 << page_bits
    while end - at >= 8:
        word = int.from_bytes(staging[at : at + 8].tobytes(), "big")
        flags = word & (page_bytes - 1)
        offset = word - flags
        if word == _EOS:
            return at + 8, _END
        if flags & ~_CONTINUE not in (_PAGE, _ZERO, _XBZRLE):
            return at, _FLAGS
        body = at + 8
        if not flags & _CONTINUE:
            if end - at < 9 or end - at < 9 + int(staging[body]):
                return at, _MORE
            their_name = staging[body + 1 : body + 1 + int(staging[body])]
            if their_name.size == 0 or not np.array_equal(their_name, name):
                return at, _BLOCK
            body += 1 + their_name.size
        elif name.size == 0:
            return at, _NO_BLOCK
        if offset >= ram.size:
            return at, _OUTSIDE
        page = offset >> page_bits
        bit = np.uint64(1 << (page & 63))
        if flags & _PAGE:
            if end - body < page_bytes:
                return at, _MORE
            ram[offset : offset + page_bytes] = staging[body : body + page_bytes]
            written[offset >> _PIECE_SHIFT] = 1
            at = body + page_bytes
            counts[0] += 1
        elif flags & _XBZRLE:
            if end - body < 3:
                return at, _MORE
            length = int.from_bytes(staging[body + 1 : body + 3].tobytes(), "big")
            if staging[body] != XBZRLE_ENCODING or length > page_bytes:
                return at, _ENCODING
            if not received[page >> 6] & bit:
                return at, _UNSENT
            body += 3
            if end - body < length:
                return at, _MORE
            if coding.decode.twin(  # type: ignore[attr-defined]
                staging[body : body + length], ram[offset : offset + page_bytes]
            )[0]:
                return at, _CODE
            written[offset >> _PIECE_SHIFT] = 1
            at = body + length
            counts[2] += 1
        else:
            if end - body < 1:
                return at, _MORE
            if staging[body]:
                return at, _FILL
            target = ram[offset : offset + page_bytes]
            if (not fresh or received[page >> 6] & bit) and target.any():
                target[:] = 0
                written[offset >> _PIECE_SHIFT] = 1
            at = body + 1
            counts[1] += 1
        received[page >> 6] |= bit
    return at, _MORE


@kernel(twin=_decode_twin)
def decode_records(
    staging: Bytes,
    at: int,
    end: int,
    name: Bytes,
    ram: Bytes,
    page_bits: int,
    received: Words,
    written: Bytes,
    fresh: bool,
    counts: NDArray[np.int64],
) -> tuple[int, int]:
    """Apply the whole records in `staging[at:end]` to one block.

    :param name: the block's name; empty when none has been named yet
    :param ram: the block's bytes, a multiple of the page size of them
    :param received: a bit for each page that has come
    :param written: a byte for each piece of `ram`, set to 1 after a page there was written
    :param fresh: whether pages that have not come are known to be zero
    :param counts: of PAGE, ZERO and XBZRLE records, increased
    :return: the position after the last record that was applied, and a `Status`
    """
    page_bytes = 1 << page_bits
    size = np.uint64(ram.size)
    words = ram.view(np.uint64)
    while end - at >= 8:
        word = np.uint64(0)
        for i in range(8):
            word = (word << np.uint64(8)) | np.uint64(staging[at + i])
        flags = np.int64(word & np.uint64(page_bytes - 1))
        if word == np.uint64(_EOS):
            return at + 8, _END
        kind = flags & ~_CONTINUE
        if kind != _PAGE and kind != _ZERO and kind != _XBZRLE:
            return at, _FLAGS
        body = at + 8
        if flags & _CONTINUE == 0:
            if end - at < 9:
                return at, _MORE
            length = int(staging[body])
            if end - at < 9 + length:
                return at, _MORE
            if length == 0 or length != name.size:
                return at, _BLOCK
            for i in range(length):
                if staging[body + 1 + i] != name[i]:
                    return at, _BLOCK
            body += 1 + length
        elif name.size == 0:
            return at, _NO_BLOCK
        if word - np.uint64(flags) >= size:
            return at, _OUTSIDE
        offset = np.int64(word) - flags
        page = offset >> page_bits
        bit = np.uint64(1) << np.uint64(page & 63)
        if kind == _PAGE:
            if end - body < page_bytes:
                return at, _MORE
            copy(ram[offset : offset + page_bytes], staging[body : body + page_bytes])
            written[offset >> _PIECE_SHIFT] = 1
            at = body + page_bytes
            counts[0] += 1
        elif kind == _XBZRLE:
            if end - body < 3:
                return at, _MORE
            length = int(staging[body + 1]) << 8 | int(staging[body + 2])
            if staging[body] != XBZRLE_ENCODING or length > page_bytes:
                return at, _ENCODING
            if received[page >> 6] & bit == 0:
                return at, _UNSENT
            body += 3
            if end - body < length:
                return at, _MORE
            code = staging[body : body + length]
            if _check(code, page_bytes)[0] != 0:
                return at, _CODE
            _apply(code, ram[offset : offset + page_bytes])
            written[offset >> _PIECE_SHIFT] = 1
            at = body + length
            counts[2] += 1
        else:
            if end - body < 1:
                return at, _MORE
            if staging[body] != 0:
                return at, _FILL
            if not fresh or received[page >> 6] & bit:
                first = offset >> 3
                for i in range(first, first + (page_bytes >> 3)):
                    if words[i] != np.uint64(0):
                        for j in range(first, first + (page_bytes >> 3)):
                            words[j] = 0
                        written[offset >> _PIECE_SHIFT] = 1
                        break
            at = body + 1
            counts[1] += 1
        received[page >> 6] |= bit
    return at, _MORE
