"""What the kernels of the stream do, once more and otherwise: slowly, and with as much of Python and numpy as can be."""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tests.jit.plain import plain

from sterna.memory.bitmap import PageNumbers, Words
from sterna.memory.content import Bytes
from sterna.memory.digest import PIECE_SHIFT
from sterna.memory.vectors import Vectors
from sterna.stream.multifd.format import COUNT_AT, HEAD_BYTES, NUMBER_AT, SIZE_AT
from sterna.stream.multifd.kernels import Layout
from sterna.stream.ram.records import Plan, Received, Rows, Status, record_head
from sterna.stream.wire import XBZRLE_ENCODING, RamFlag
from sterna.stream.xbzrle import coding
from sterna.stream.xbzrle.changes import (
    CLEAR,
    CODE_ROOM,
    HELD,
    KEPT_PASSES,
    BatchRecord,
    Counted,
    Places,
    _keep,
    _kept_page,
    is_sparse,
)

_ZERO, _PAGE, _XBZRLE = int(RamFlag.ZERO), int(RamFlag.PAGE), int(RamFlag.XBZRLE)
_CONTINUE = int(RamFlag.CONTINUE)


def encode_records(
    plan: Plan,
    words: NDArray[np.uint64],
    pages: NDArray[np.int64],
    name: Bytes,
    suffix: Bytes,
    headers: Bytes,
    iov: Annotated[NDArray[np.uint64], 2],
) -> tuple[int, int, int]:
    page_bits, used, hva, base = plan[0].tolist()
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


def scan(
    staging: Bytes, at: int, end: int, name: Bytes, page_bits: int, pages: int, rows: Rows
) -> tuple[int, int, int, int]:
    page_bytes = 1 << page_bits
    data = staging[:end].tobytes()
    for found in range(rows.size):
        word = int.from_bytes(data[at : at + 8], "big")
        if end - at < 8:
            return found, at, Status.MORE, -1
        if word == RamFlag.EOS:
            return found, at + 8, Status.END, -1
        page, kind = word >> page_bits, word & (page_bytes - 1) & ~_CONTINUE
        if kind not in (_PAGE, _ZERO, _XBZRLE):
            return found, at, Status.FLAGS, -1
        body = at + 8
        if not word & _CONTINUE:
            if end - at < 9 or end - at < 9 + data[body]:
                return found, at, Status.MORE, -1
            their_name = data[body + 1 : body + 1 + data[body]]
            if not their_name or their_name != name.tobytes():
                return found, at, Status.BLOCK, -1
            body += 1 + len(their_name)
        elif not name.size:
            return found, at, Status.NO_BLOCK, -1
        if page >= pages:
            return found, at, Status.OUTSIDE, -1
        size = {_PAGE: page_bytes, _ZERO: 1, _XBZRLE: 3}[kind]
        if end - body < size:
            return found, at, Status.MORE, -1
        if kind == _ZERO and data[body]:
            return found, at, Status.FILL, -1
        if kind == _XBZRLE:
            size = int.from_bytes(data[body + 1 : body + 3], "big")
            if data[body] != XBZRLE_ENCODING or size > page_bytes:
                return found, at, Status.ENCODING, -1
            body += 3
            if end - body < size:
                return found, at, Status.MORE, page
            if plain(coding.check)(staging[body : body + size], page_bytes)[0]:
                return found, at, Status.CODE, page
        rows[found] = kind, page, at, body, size
        at = body + size
    return rows.size, at, Status.FULL, -1


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
    page_bits, fresh = int(stream[0]["page_bits"]), bool(stream[0]["fresh"])
    status, part = Status.FULL, ram.reshape(-1, 1 << page_bits)
    while status == Status.FULL:
        found, at, status, page = scan(staging, at, end, name, page_bits, len(part), rows)
        for kind, number, start, body, size in rows[:found].tolist():
            bit, target = np.uint64(1 << (number & 63)), part[number]
            came = bool(received[number >> 6] & bit)
            if kind == _XBZRLE and not came:
                return start, Status.UNSENT
            data = staging[body : body + size]
            if kind == _PAGE:
                target[:] = data
            elif kind == _XBZRLE:
                plain(coding.apply)(data, target)
            writes = kind != _ZERO or ((came or not fresh) and bool(target.any()))
            if kind == _ZERO and writes:
                target[:] = 0
            if writes:
                written[number << page_bits >> PIECE_SHIFT] = 1
            stream[0][{_PAGE: "whole", _ZERO: "zero", _XBZRLE: "changed"}[kind]] += 1
            received[number >> 6] |= bit
        if page >= 0 and not received[page >> 6] & np.uint64(1 << (page & 63)):
            status = Status.UNSENT
    return at, status


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
    first_key, page_bits, used, hva, base, cache_hva, age, keep, sparse = batch[0].tolist()
    zeros, fresh, old = scratch
    counted = counts[0]
    size = 1 << page_bits
    rows: list[tuple[int, int]] = []
    run, named = 0, False
    page_bytes = 0
    for page in pages.tolist():
        key = first_key + page
        slot = key & (places.size - 1)
        place = places[slot]
        kept = cached[slot * size // 8 : (slot + 1) * size // 8]
        guest = words[page * size // 8 : (page + 1) * size // 8]
        hit = bool(place["key"] == key)
        enters = not hit and keep and (place["key"] == 0 or place["age"] + KEPT_PASSES <= age)
        source, kinds, code = hva + page * size, [_PAGE], b""
        fresh[:] = guest
        if hit or enters:
            place["key"], place["age"] = key, age
        short = codes[slot * CODE_ROOM : (slot + 1) * CODE_ROOM]
        before = plain(_kept_page)(int(place["state"]), kept, short, zeros, old)
        if not fresh.any():
            kinds = [_ZERO]
            counted["zero"] += 1
            if (hit and keep) or enters:
                place["state"] = CLEAR
        else:
            target, length = np.empty(size, dtype=np.uint8), coding.OVERFLOW
            if hit:
                counted["hits"] += 1
                length = plain(coding.encode)(before, fresh, target)
                if length == coding.UNCHANGED:
                    continue
                if length == coding.OVERFLOW:
                    counted["overflows"] += 1
                    counted["code_bytes"] += size
                else:
                    kinds = [_XBZRLE]
            else:
                counted["misses"] += 1
                if sparse and plain(is_sparse)(fresh):
                    target = target[: size // 2]
                    length = plain(coding.encode)(zeros, fresh, target)
                    if length != coding.OVERFLOW:
                        kinds = [_ZERO, _XBZRLE]
                        counted["sparse"] += 1
            if length != coding.OVERFLOW:
                code = bytes((XBZRLE_ENCODING, *length.to_bytes(2, "big"))) + target[:length].tobytes()
                if hit:
                    counted["codes"] += 1
                    counted["code_bytes"] += len(code) + (0 if named else name.size)
            if (hit and keep) or enters:
                if length == coding.OVERFLOW or (hit and place["state"] == HELD):
                    kept[:] = fresh
                    place["state"] = HELD
                    source = cache_hva + slot * size
                else:
                    place["state"] = plain(_keep)(fresh, kept, short, zeros, sparse)
        if kinds == [_PAGE] and apart.size:
            counted["normal"] += 1
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
            counted["normal"] += 1
            page_bytes += size
            rows += [(base + run, used - run), (source, size)]
            run = used
    out[used : used + suffix.size] = suffix
    used += suffix.size
    if used > run and not apart.size:
        rows.append((base + run, used - run))
    iov[: len(rows)] = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    return len(rows), used + page_bytes


def split_zero(
    words: Words, pages: PageNumbers, page_bits: int, zero: PageNumbers, whole: PageNumbers
) -> int:
    marks = [not words[page << page_bits - 3 : (page + 1) << page_bits - 3].any() for page in pages.tolist()]
    found = np.array(marks, dtype=bool)
    zero[: found.sum()] = pages[found]
    whole[: pages.size - found.sum()] = pages[~found]
    return int(found.sum())


def gather_pages(
    pages: PageNumbers, hva: int, page_bits: int, sources: Vectors, vectors: Vectors, row: int
) -> int:
    if len(sources):
        vectors[row : row + len(sources)] = sources
        return row + len(sources)
    starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    lengths = np.diff(starts, append=pages.size)
    last = row + starts.size
    vectors[row:last, 0] = np.uint64(hva) + (pages[starts] << page_bits).astype(np.uint64)
    vectors[row:last, 1] = lengths << page_bits
    return int(last)


def lay_out(
    layout: Layout,
    pages: PageNumbers,
    sources: Vectors,
    head: Bytes,
    headers: Annotated[NDArray[np.uint8], 2],
    vectors: Vectors,
) -> int:
    row = 0
    page_bits, number, hva, address = layout[0].tolist()
    per_packet = (headers.shape[1] - HEAD_BYTES) // 8
    for packet in range(len(headers)):
        first = packet * per_packet
        some = pages[first : first + per_packet]
        header = headers[packet]
        header[:HEAD_BYTES] = head
        for at, size, value in (
            (COUNT_AT, 4, some.size),
            (SIZE_AT, 4, some.size << page_bits),
            (NUMBER_AT, 8, number + packet),
        ):
            header[at : at + size] = np.frombuffer(int(value).to_bytes(size, "big"), dtype=np.uint8)
        offsets = (some << page_bits).astype(">u8").view(np.uint8)
        header[HEAD_BYTES : HEAD_BYTES + offsets.size] = offsets
        vectors[row] = address + packet * headers.shape[1], headers.shape[1]
        row = gather_pages(some, hva, page_bits, sources[first : first + per_packet], vectors, row + 1)
    return row
