"""How often each page of a stream came, and in which passes: compiled kernels that keep count, and their twins.

A *turn* is a run of records whose places in RAM (blocks in the stream's order, then pages) only go up. A page that comes
again within a pass proves that the source has looked for dirty pages anew: the pass that the page belongs to began where
the current turn did.
"""

from enum import IntEnum
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import READONLY, kernel
from sterna.memory.bitmap import Words
from sterna.stream.ram.records import Bytes, copy


class Tally(IntEnum):
    """Places in the array of tallies.

    TURN counts turns from 1; PASS_FIRST_TURN is the first of the current pass. The tallies of the current turn
    are apart from those of the pass' turns before it, because a turn may prove to begin a pass. PREVIOUS is the place of
    the page before, -1 when a turn begins; PASS_OFFSET is -1 before the first page. HELD counts pages that have been put
    into memory. ZERO_BEFORE is the place of the page of the record before if that says that it is zero, else -1: a change of
    the same page that follows at once completes it.
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
    TURN_CHANGED = 13
    PASS_CHANGED = 14
    CHANGED_BYTES = 15
    HELD = 16
    ZERO_BEFORE = 17


def new_tallies() -> NDArray[np.int64]:
    """Tallies before the first record."""
    tallies = np.zeros(len(Tally), dtype=np.int64)
    tallies[Tally.PREVIOUS] = tallies[Tally.PASS_OFFSET] = tallies[Tally.ZERO_BEFORE] = -1
    tallies[Tally.TURN] = tallies[Tally.PASS_FIRST_TURN] = tallies[Tally.MAY_END_PASS] = 1
    return tallies


_PREVIOUS, _TURN, _PASS_FIRST_TURN = int(Tally.PREVIOUS), int(Tally.TURN), int(Tally.PASS_FIRST_TURN)
_TURN_OFFSET, _TURN_NORMAL, _TURN_CHANGED = (
    int(Tally.TURN_OFFSET),
    int(Tally.TURN_NORMAL),
    int(Tally.TURN_CHANGED),
)
_TURN_ZERO, _TURN_BYTES = int(Tally.TURN_ZERO), int(Tally.TURN_BYTES)
_PASS_OFFSET, _PASS_NORMAL, _PASS_CHANGED = (
    int(Tally.PASS_OFFSET),
    int(Tally.PASS_NORMAL),
    int(Tally.PASS_CHANGED),
)
_PASS_ZERO, _PASS_BYTES = int(Tally.PASS_ZERO), int(Tally.PASS_BYTES)
_MAY_END_PASS, _HELD = int(Tally.MAY_END_PASS), int(Tally.HELD)
_GREATEST = 0xFFFFFFFF

Page = int | np.signedinteger[Any]
"""A page's number, as plain Python or compiled code has it."""


def _next_turn_twin(offset: int, tallies: NDArray[np.int64]) -> None:
    for of_pass, of_turn in (
        (_PASS_NORMAL, _TURN_NORMAL),
        (_PASS_ZERO, _TURN_ZERO),
        (_PASS_CHANGED, _TURN_CHANGED),
        (_PASS_BYTES, _TURN_BYTES),
    ):
        tallies[of_pass] += tallies[of_turn]
        tallies[of_turn] = 0
    if tallies[_TURN] == _GREATEST:
        tallies[_MAY_END_PASS] = 0
    else:
        tallies[_TURN] += 1
    tallies[_TURN_OFFSET] = offset
    tallies[_PREVIOUS] = -1


@kernel(twin=_next_turn_twin)
def next_turn(offset: int, tallies: NDArray[np.int64]) -> None:
    """A turn begins.

    :param offset: offset in the stream of its first record
    """
    tallies[_PASS_NORMAL] += tallies[_TURN_NORMAL]
    tallies[_PASS_ZERO] += tallies[_TURN_ZERO]
    tallies[_PASS_CHANGED] += tallies[_TURN_CHANGED]
    tallies[_PASS_BYTES] += tallies[_TURN_BYTES]
    tallies[_TURN_NORMAL] = 0
    tallies[_TURN_ZERO] = 0
    tallies[_TURN_CHANGED] = 0
    tallies[_TURN_BYTES] = 0
    if tallies[_TURN] == _GREATEST:
        tallies[_MAY_END_PASS] = 0
    else:
        tallies[_TURN] += 1
    tallies[_TURN_OFFSET] = offset
    tallies[_PREVIOUS] = -1


def _note_page_twin(
    page: Page,
    first: int,
    offset: int,
    turns: NDArray[np.uint32],
    times: NDArray[np.uint32],
    tallies: NDArray[np.int64],
) -> bool:
    if first + page <= tallies[_PREVIOUS] or turns[page] == tallies[_TURN]:
        _next_turn_twin(offset, tallies)
    elif tallies[_PASS_OFFSET] < 0:
        tallies[_PASS_OFFSET] = tallies[_TURN_OFFSET] = offset
    if tallies[_MAY_END_PASS] and turns[page] >= tallies[_PASS_FIRST_TURN]:
        return True
    tallies[_PREVIOUS] = first + page
    turns[page] = tallies[_TURN]
    times[page] = min(int(times[page]) + 1, _GREATEST)
    return False


@kernel(twin=_note_page_twin, ahead=False)
def note_page(
    page: Page,
    first: int,
    offset: int,
    turns: NDArray[np.uint32],
    times: NDArray[np.uint32],
    tallies: NDArray[np.int64],
) -> bool:
    """Put a page that comes into the tallies.

    :param first: number of pages in the blocks before the page's
    :param offset: offset in the stream of its record
    :return: whether it belongs to a new pass; then it is not in the tallies, and must be noted again when
        the pass has been ended
    """
    position = first + page
    # A page of this turn that the order does not tell came on a channel of multifd. With a turn of its own it is noted when it
    # is tried again, however often it comes.
    if position <= tallies[_PREVIOUS] or np.int64(turns[page]) == tallies[_TURN]:
        next_turn(offset, tallies)
    elif tallies[_PASS_OFFSET] < 0:
        tallies[_PASS_OFFSET] = offset
        tallies[_TURN_OFFSET] = offset
    if tallies[_MAY_END_PASS] != 0 and np.int64(turns[page]) >= tallies[_PASS_FIRST_TURN]:
        return True
    tallies[_PREVIOUS] = position
    turns[page] = np.uint32(tallies[_TURN])
    if times[page] != np.uint32(_GREATEST):
        times[page] += np.uint32(1)
    return False


def _hold_twin(page: Page, held: Words, tallies: NDArray[np.int64]) -> None:
    bit = np.uint64(1 << (int(page) & 63))
    tallies[_HELD] += not int(held[page >> 6] & bit)
    held[page >> 6] |= bit


@kernel(twin=_hold_twin, ahead=False)
def hold(page: Page, held: Words, tallies: NDArray[np.int64]) -> None:
    """A page is put into memory."""
    bit = np.uint64(1) << np.uint64(page & 63)
    if held[page >> 6] & bit == 0:
        tallies[_HELD] += 1
        held[page >> 6] |= bit


def _place_twin(
    pages: NDArray[np.int64],
    done: int,
    data: Bytes,
    page_bits: int,
    turns: NDArray[np.uint32],
    times: NDArray[np.uint32],
    tallies: NDArray[np.int64],
    ram: Bytes,
    held: Words,
) -> int:
    size = 1 << page_bits
    for i in range(done, pages.size):
        page = int(pages[i])
        if tallies[_MAY_END_PASS] and tallies[_PASS_FIRST_TURN] <= turns[page] < tallies[_TURN]:
            return i
        turns[page] = tallies[_TURN]
        times[page] = min(int(times[page]) + 1, _GREATEST)
        if ram.size:
            _hold_twin(page, held, tallies)
            ram[page << page_bits : (page + 1) << page_bits] = data[i * size : (i + 1) * size]
    return int(pages.size)


@kernel(twin=_place_twin)
def place_pages(
    pages: NDArray[np.int64],
    done: int,
    data: Annotated[Bytes, READONLY],
    page_bits: int,
    turns: NDArray[np.uint32],
    times: NDArray[np.uint32],
    tallies: NDArray[np.int64],
    ram: Bytes,
    held: Words,
) -> int:
    """Put pages of one block, that come in any order within a turn, into the ledger and into memory.

    :param pages: all inside the block
    :param done: how many of them are there already
    :param data: their bytes, in the same order
    :param ram: as for `locate_records`
    :return: how many are there now; fewer than all when the next belongs to a new pass
    """
    size = 1 << page_bits
    for i in range(done, pages.size):
        page = pages[i]
        turn = np.int64(turns[page])
        if tallies[_MAY_END_PASS] != 0 and turn >= tallies[_PASS_FIRST_TURN] and turn < tallies[_TURN]:
            return i
        turns[page] = np.uint32(tallies[_TURN])
        if times[page] != np.uint32(_GREATEST):
            times[page] += np.uint32(1)
        if ram.size > 0:
            hold(page, held, tallies)
            copy(ram[page * size : (page + 1) * size], data[i * size : (i + 1) * size])
    return pages.size
