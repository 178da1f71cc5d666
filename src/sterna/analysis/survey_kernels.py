"""A compiled kernel that finds the records of the ``ram`` section, and puts pages where they are wanted; and its twin."""

import numpy as np
from numpy.typing import NDArray

from sterna.analysis.survey_tallies import Tally, hold, note_page
from sterna.jit.kernel import kernel
from sterna.memory.bitmap import Words
from sterna.stream.ram.records import Bytes, Status, copy
from sterna.stream.wire import XBZRLE_ENCODING, RamFlag
from sterna.stream.xbzrle import coding

NEW_PASS = len(Status)
"""Status beside those of `scan`: the record at hand belongs to a new pass."""

_MORE, _END, _BLOCK, _NO_BLOCK = int(Status.MORE), int(Status.END), int(Status.BLOCK), int(Status.NO_BLOCK)
_OUTSIDE, _FLAGS, _FILL = int(Status.OUTSIDE), int(Status.FLAGS), int(Status.FILL)
_ENCODING, _CODE, _UNSENT = int(Status.ENCODING), int(Status.CODE), int(Status.UNSENT)
_ZERO, _PAGE, _XBZRLE = int(RamFlag.ZERO), int(RamFlag.PAGE), int(RamFlag.XBZRLE)
_EOS, _CONTINUE = int(RamFlag.EOS), int(RamFlag.CONTINUE)
_TURN_NORMAL, _TURN_ZERO, _TURN_CHANGED = (
    int(Tally.TURN_NORMAL),
    int(Tally.TURN_ZERO),
    int(Tally.TURN_CHANGED),
)
_ZERO_BEFORE = int(Tally.ZERO_BEFORE)
_TURN_BYTES, _ZERO_BYTES, _CHANGED_BYTES = (
    int(Tally.TURN_BYTES),
    int(Tally.ZERO_BYTES),
    int(Tally.CHANGED_BYTES),
)
_apply, _check = coding.apply, coding.check


def _locate_twin(
    staging: Bytes,
    at: int,
    end: int,
    base: int,
    name: Bytes,
    first: int,
    page_bits: int,
    turns: NDArray[np.uint32],
    times: NDArray[np.uint32],
    block_counts: NDArray[np.int64],
    tallies: NDArray[np.int64],
    ram: Bytes,
    held: Words,
) -> tuple[int, int]:
    page_bytes = 1 << page_bits
    while end - at >= 8:
        word = int.from_bytes(staging[at : at + 8].tobytes(), "big")
        page, flags = word >> page_bits, word & (page_bytes - 1)
        if word == _EOS:
            tallies[_ZERO_BEFORE] = -1
            return at + 8, _END
        kind = flags & ~_CONTINUE
        if kind not in (_PAGE, _ZERO, _XBZRLE):
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
        if page >= turns.size:
            return at, _OUTSIDE
        after = body + {_PAGE: page_bytes, _ZERO: 1, _XBZRLE: 3}[kind]
        if after > end:
            return at, _MORE
        if kind == _ZERO and staging[body]:
            return at, _FILL
        code = staging[:0]
        if kind == _XBZRLE:
            length = int.from_bytes(staging[body + 1 : body + 3].tobytes(), "big")
            if staging[body] != XBZRLE_ENCODING or length > page_bytes:
                return at, _ENCODING
            if not turns[page]:
                return at, _UNSENT
            if after + length > end:
                return at, _MORE
            code = staging[after : after + length]
            if coding.check.twin(code, page_bytes)[0]:  # type: ignore[attr-defined]
                return at, _CODE
            after += length
        completes = kind == _XBZRLE and tallies[_ZERO_BEFORE] == first + page
        if not completes and note_page.twin(  # type: ignore[attr-defined]
            page, first, base + at, turns, times, tallies
        ):
            return at, NEW_PASS
        tallies[_ZERO_BEFORE] = first + page if kind == _ZERO else -1
        target = ram[page << page_bits : (page + 1) << page_bits]
        tallies[_TURN_BYTES] += after - at
        if kind == _ZERO:
            tallies[_TURN_ZERO] += 1
            tallies[_ZERO_BYTES] += after - at
            block_counts[1] += 1
            if ram.size and held[page >> 6] & np.uint64(1 << (int(page) & 63)):
                target[:] = 0
        else:
            if ram.size:
                hold.twin(page, held, tallies)  # type: ignore[attr-defined]
            if kind == _PAGE:
                tallies[_TURN_NORMAL] += 1
                block_counts[0] += 1
                if ram.size:
                    target[:] = staging[body:after]
            else:
                tallies[_TURN_CHANGED] += 1
                tallies[_CHANGED_BYTES] += after - at
                block_counts[2] += 1
                if ram.size:
                    coding.apply.twin(code, target)  # type: ignore[attr-defined]
        at = after
    return at, _MORE


@kernel(twin=_locate_twin)
def locate_records(
    staging: Bytes,
    at: int,
    end: int,
    base: int,
    name: Bytes,
    first: int,
    page_bits: int,
    turns: NDArray[np.uint32],
    times: NDArray[np.uint32],
    block_counts: NDArray[np.int64],
    tallies: NDArray[np.int64],
    ram: Bytes,
    held: Words,
) -> tuple[int, int]:
    """Find the whole records in `staging[at:end]` that are of one block.

    :param base: offset in the stream of `staging[0]`
    :param name: the block's name; empty when none has been named yet
    :param first: number of pages in the blocks before it
    :param turns: for each of the block's pages the turn that sent it last, 0 for none
    :param times: for each of the block's pages how often it was sent
    :param block_counts: of PAGE, ZERO and XBZRLE records of the block, increased
    :param tallies: see `Tally`
    :param ram: where pages go: as many bytes as the block has, or none if pages are not wanted
    :param held: a bit for each page of `ram` that has been written to
    :return: the position after the last record that was found, and a `Status` or `NEW_PASS`
    """
    page_bytes = 1 << page_bits
    shift = np.uint64(page_bits)
    words = ram.view(np.uint64)
    while end - at >= 8:
        word = np.uint64(0)
        for i in range(8):
            word = (word << np.uint64(8)) | np.uint64(staging[at + i])
        if word == np.uint64(_EOS):
            tallies[_ZERO_BEFORE] = -1
            return at + 8, _END
        flags = np.int64(word & np.uint64(page_bytes - 1))
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
        if (word >> shift) >= np.uint64(turns.size):
            return at, _OUTSIDE
        page = np.int64(word >> shift)
        after = body + 1
        if kind == _PAGE:
            after = body + page_bytes
        elif kind == _XBZRLE:
            after = body + 3
        if after > end:
            return at, _MORE
        if kind == _ZERO and staging[body] != 0:
            return at, _FILL
        if kind == _XBZRLE:
            size = int(staging[body + 1]) << 8 | int(staging[body + 2])
            if staging[body] != XBZRLE_ENCODING or size > page_bytes:
                return at, _ENCODING
            if turns[page] == np.uint32(0):
                return at, _UNSENT
            if after + size > end:
                return at, _MORE
            body = after
            after += size
            if _check(staging[body:after], page_bytes)[0] != 0:
                return at, _CODE
        completes = kind == _XBZRLE and tallies[_ZERO_BEFORE] == first + page
        if not completes and note_page(page, first, base + at, turns, times, tallies):
            return at, NEW_PASS
        tallies[_ZERO_BEFORE] = first + page if kind == _ZERO else -1
        tallies[_TURN_BYTES] += after - at
        target = page << page_bits
        if kind == _ZERO:
            tallies[_TURN_ZERO] += 1
            tallies[_ZERO_BYTES] += after - at
            block_counts[1] += 1
            if ram.size > 0 and held[page >> 6] & (np.uint64(1) << np.uint64(page & 63)):
                for i in range(target >> 3, (target + page_bytes) >> 3):
                    words[i] = 0
        elif kind == _PAGE:
            tallies[_TURN_NORMAL] += 1
            block_counts[0] += 1
            if ram.size > 0:
                hold(page, held, tallies)
                copy(ram[target : target + page_bytes], staging[body:after])
        else:
            tallies[_TURN_CHANGED] += 1
            tallies[_CHANGED_BYTES] += after - at
            block_counts[2] += 1
            if ram.size > 0:
                hold(page, held, tallies)
                _apply(staging[body:after], ram[target : target + page_bytes])
        at = after
    return at, _MORE
