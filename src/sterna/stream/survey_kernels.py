"""A compiled kernel that finds the records of the ``ram`` section without putting pages anywhere, and its twin.

It keeps the tallies from which passes are derived. A *turn* is a run of records whose places in RAM (blocks in
the stream's order, then pages) only go up. A page that comes again within a pass proves that the source has
looked for dirty pages anew: the pass that the page belongs to began where the current turn did.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from sterna.memory.kernel import kernel
from sterna.stream.ram_kernels import Bytes, Status
from sterna.stream.wire import RamFlag

NEW_PASS = len(Status)
"""Status beside those of `decode_records`: the record at hand belongs to a new pass."""


class Tally(IntEnum):
    """Places in the array of tallies.

    TURN counts turns from 1; PASS_FIRST_TURN is the first of the current pass. The tallies of the current turn
    are apart from those of the pass' turns before it, because a turn may prove to begin a pass.
    """

    PREVIOUS = 0
    TURN = 1
    PASS_FIRST_TURN = 2
    TURN_OFFSET = 3
    TURN_NORMAL = 4
    TURN_ZERO = 5
    TURN_BYTES = 6
    PASS_OFFSET = 7
    PASS_NORMAL = 8
    PASS_ZERO = 9
    PASS_BYTES = 10
    ZERO_BYTES = 11
    MAY_END_PASS = 12


def new_tallies() -> NDArray[np.int64]:
    """Tallies before the first record."""
    tallies = np.zeros(len(Tally), dtype=np.int64)
    tallies[Tally.PREVIOUS] = -1
    tallies[Tally.TURN] = tallies[Tally.PASS_FIRST_TURN] = tallies[Tally.MAY_END_PASS] = 1
    return tallies


_MORE, _END, _BLOCK, _NO_BLOCK = int(Status.MORE), int(Status.END), int(Status.BLOCK), int(Status.NO_BLOCK)
_OUTSIDE, _FLAGS, _FILL = int(Status.OUTSIDE), int(Status.FLAGS), int(Status.FILL)
_ZERO, _PAGE, _EOS, _CONTINUE = (
    int(RamFlag.ZERO),
    int(RamFlag.PAGE),
    int(RamFlag.EOS),
    int(RamFlag.CONTINUE),
)
_PREVIOUS, _TURN, _PASS_FIRST_TURN = int(Tally.PREVIOUS), int(Tally.TURN), int(Tally.PASS_FIRST_TURN)
_TURN_OFFSET, _TURN_NORMAL = int(Tally.TURN_OFFSET), int(Tally.TURN_NORMAL)
_TURN_ZERO, _TURN_BYTES = int(Tally.TURN_ZERO), int(Tally.TURN_BYTES)
_PASS_OFFSET, _PASS_NORMAL = int(Tally.PASS_OFFSET), int(Tally.PASS_NORMAL)
_PASS_ZERO, _PASS_BYTES = int(Tally.PASS_ZERO), int(Tally.PASS_BYTES)
_ZERO_BYTES, _MAY_END_PASS = int(Tally.ZERO_BYTES), int(Tally.MAY_END_PASS)
_GREATEST = 0xFFFFFFFF


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
    pages: NDArray[np.int64],
    places: NDArray[np.int64],
) -> tuple[int, int, int]:
    page_bytes = 1 << page_bits
    found = 0
    while end - at >= 8:
        word = int.from_bytes(staging[at : at + 8].tobytes(), "big")
        page, flags = word >> page_bits, word & (page_bytes - 1)
        if word == _EOS:
            return at + 8, _END, found
        if flags & ~_CONTINUE not in (_PAGE, _ZERO):
            return at, _FLAGS, found
        body = at + 8
        if not flags & _CONTINUE:
            if end - at < 9 or end - at < 9 + int(staging[body]):
                return at, _MORE, found
            their_name = staging[body + 1 : body + 1 + int(staging[body])]
            if their_name.size == 0 or not np.array_equal(their_name, name):
                return at, _BLOCK, found
            body += 1 + their_name.size
        elif name.size == 0:
            return at, _NO_BLOCK, found
        if page >= turns.size:
            return at, _OUTSIDE, found
        after = body + (page_bytes if flags & _PAGE else 1)
        if after > end:
            return at, _MORE, found
        if flags & _ZERO and staging[body]:
            return at, _FILL, found
        if first + page <= tallies[_PREVIOUS]:
            for of_pass, of_turn in ((_PASS_NORMAL, _TURN_NORMAL), (_PASS_ZERO, _TURN_ZERO)):
                tallies[of_pass] += tallies[of_turn]
                tallies[of_turn] = 0
            tallies[_PASS_BYTES] += tallies[_TURN_BYTES]
            tallies[_TURN_BYTES] = 0
            if tallies[_TURN] == _GREATEST:
                tallies[_MAY_END_PASS] = 0
            else:
                tallies[_TURN] += 1
            tallies[_TURN_OFFSET] = base + at
            tallies[_PREVIOUS] = first + page - 1
        elif tallies[_PREVIOUS] < 0:
            tallies[_PASS_OFFSET] = tallies[_TURN_OFFSET] = base + at
        if tallies[_MAY_END_PASS] and turns[page] >= tallies[_PASS_FIRST_TURN]:
            return at, NEW_PASS, found
        tallies[_PREVIOUS] = first + page
        turns[page] = tallies[_TURN]
        times[page] = min(int(times[page]) + 1, _GREATEST)
        tallies[_TURN_BYTES] += after - at
        if flags & _PAGE:
            tallies[_TURN_NORMAL] += 1
            block_counts[0] += 1
        else:
            tallies[_TURN_ZERO] += 1
            tallies[_ZERO_BYTES] += after - at
            block_counts[1] += 1
        if pages.size:
            pages[found] = page
            places[found] = body if flags & _PAGE else -1
            found += 1
        at = after
    return at, _MORE, found


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
    pages: NDArray[np.int64],
    places: NDArray[np.int64],
) -> tuple[int, int, int]:
    """Find the whole records in `staging[at:end]` that are of one block.

    :param base: offset in the stream of `staging[0]`
    :param name: the block's name; empty when none has been named yet
    :param first: number of pages in the blocks before it
    :param turns: for each of the block's pages the turn that sent it last, 0 for none
    :param times: for each of the block's pages how often it was sent
    :param block_counts: of PAGE and ZERO records of the block, increased
    :param tallies: see `Tally`
    :param pages: where page numbers go: room for as many records as `staging` can hold, or none if they are
        not wanted
    :param places: where the places in `staging` of pages' data go, -1 for pages of zeros
    :return: the position after the last record that was found, a `Status` or `NEW_PASS`, and how many page
        numbers there are
    """
    page_bytes = 1 << page_bits
    shift = np.uint64(page_bits)
    found = 0
    while end - at >= 8:
        word = np.uint64(0)
        for i in range(8):
            word = (word << np.uint64(8)) | np.uint64(staging[at + i])
        if word == np.uint64(_EOS):
            return at + 8, _END, found
        flags = np.int64(word & np.uint64(page_bytes - 1))
        kind = flags & ~_CONTINUE
        if kind != _PAGE and kind != _ZERO:
            return at, _FLAGS, found
        body = at + 8
        if flags & _CONTINUE == 0:
            if end - at < 9:
                return at, _MORE, found
            length = int(staging[body])
            if end - at < 9 + length:
                return at, _MORE, found
            if length == 0 or length != name.size:
                return at, _BLOCK, found
            for i in range(length):
                if staging[body + 1 + i] != name[i]:
                    return at, _BLOCK, found
            body += 1 + length
        elif name.size == 0:
            return at, _NO_BLOCK, found
        if (word >> shift) >= np.uint64(turns.size):
            return at, _OUTSIDE, found
        page = np.int64(word >> shift)
        after = body + (page_bytes if kind == _PAGE else 1)
        if after > end:
            return at, _MORE, found
        if kind == _ZERO and staging[body] != 0:
            return at, _FILL, found
        position = first + page
        if position <= tallies[_PREVIOUS]:
            tallies[_PASS_NORMAL] += tallies[_TURN_NORMAL]
            tallies[_PASS_ZERO] += tallies[_TURN_ZERO]
            tallies[_PASS_BYTES] += tallies[_TURN_BYTES]
            tallies[_TURN_NORMAL] = 0
            tallies[_TURN_ZERO] = 0
            tallies[_TURN_BYTES] = 0
            if tallies[_TURN] == _GREATEST:
                tallies[_MAY_END_PASS] = 0
            else:
                tallies[_TURN] += 1
            tallies[_TURN_OFFSET] = base + at
            tallies[_PREVIOUS] = position - 1
        elif tallies[_PREVIOUS] < 0:
            tallies[_PASS_OFFSET] = base + at
            tallies[_TURN_OFFSET] = base + at
        if tallies[_MAY_END_PASS] != 0 and np.int64(turns[page]) >= tallies[_PASS_FIRST_TURN]:
            return at, NEW_PASS, found
        tallies[_PREVIOUS] = position
        turns[page] = np.uint32(tallies[_TURN])
        if times[page] != np.uint32(_GREATEST):
            times[page] += np.uint32(1)
        tallies[_TURN_BYTES] += after - at
        if kind == _PAGE:
            tallies[_TURN_NORMAL] += 1
            block_counts[0] += 1
        else:
            tallies[_TURN_ZERO] += 1
            tallies[_ZERO_BYTES] += after - at
            block_counts[1] += 1
        if pages.size > 0:
            pages[found] = page
            places[found] = body if kind == _PAGE else -1
            found += 1
        at = after
    return at, _MORE, found
