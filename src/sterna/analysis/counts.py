"""What a stream's records and packets add up to, and how often each page came, in which passes: compiled kernels.

A *sweep* is a run of records whose places in RAM (blocks in the stream's order, then pages) only go up. A page that comes
again within a pass proves that the source has synced its dirty log: the pass that the page belongs to began where
the current sweep did.
"""

from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import kernel
from sterna.memory.bitmap import Words
from sterna.memory.content import Bytes, copy
from sterna.stream.ram.records import Rows, Status, scan
from sterna.stream.wire import RamFlag
from sterna.stream.xbzrle import coding

NEW_PASS = len(Status)
"""Status beside those of `scan`: the record at hand belongs to a new pass."""

COUNTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            # Log2 of the stream's page size, and the offset in the stream of the bytes at hand.
            "page_bits",
            "base",
            # The current sweep's number, from 1, and that of the first of the current pass; the place of the page before, -1 when
            # a sweep begins.
            "sweep",
            "pass_first_sweep",
            "previous",
            # Of the current sweep: it may prove to begin a pass, so it is apart from the pass' sweeps before it.
            "sweep_offset",
            "sweep_normal",
            "sweep_zero",
            "sweep_changed",
            "sweep_bytes",
            # Of the pass; the offset is -1 before the first page.
            "pass_offset",
            "pass_normal",
            "pass_zero",
            "pass_changed",
            "pass_bytes",
            "may_end_pass",
            # Bytes of records of zero pages, and of changes, in all.
            "zero_bytes",
            "changed_bytes",
            # Pages that have been put into memory.
            "held",
            # The place of the page of the record before if that says that it is zero, else -1: a change of the same page that
            # follows at once completes it.
            "zero_before",
        )
    ]
)
BLOCK_COUNTS = np.dtype([(name, np.int64) for name in ("first", "normal", "zero", "changed")])
"""Number of pages in the blocks before it; PAGE (or in packets), ZERO and XBZRLE records of the block."""
PAGE_COUNTS = np.dtype([(name, np.uint32) for name in ("sweep", "times")])
"""The sweep that sent a page last, 0 for none; how often it was sent."""

Counts: TypeAlias = Annotated[NDArray[Any], COUNTS]
"""`shape (1,)`"""
BlockCounts: TypeAlias = Annotated[NDArray[Any], BLOCK_COUNTS]
"""`shape (1,)`"""
PageCounts: TypeAlias = Annotated[NDArray[Any], PAGE_COUNTS]
"""`shape (pages,)`"""

_END, _FULL, _UNSENT, _NEW_PASS = int(Status.END), int(Status.FULL), int(Status.UNSENT), NEW_PASS
_ZERO, _PAGE, _XBZRLE = int(RamFlag.ZERO), int(RamFlag.PAGE), int(RamFlag.XBZRLE)
_apply = coding.apply
_GREATEST = 0xFFFFFFFF


def new_counts(page_bits: int) -> NDArray[Any]:
    """Before the first record."""
    counts = np.zeros(1, dtype=COUNTS)
    for name in ("previous", "pass_offset", "zero_before"):
        counts[name] = -1
    for name in ("sweep", "pass_first_sweep", "may_end_pass"):
        counts[name] = 1
    counts["page_bits"] = page_bits
    return counts


@kernel()
def next_sweep(offset: int, counts: Counts) -> None:
    """A sweep begins.

    :param offset: offset in the stream of its first record
    """
    now = counts[0]
    now["pass_normal"] += now["sweep_normal"]
    now["pass_zero"] += now["sweep_zero"]
    now["pass_changed"] += now["sweep_changed"]
    now["pass_bytes"] += now["sweep_bytes"]
    now["sweep_normal"] = 0
    now["sweep_zero"] = 0
    now["sweep_changed"] = 0
    now["sweep_bytes"] = 0
    if now["sweep"] == _GREATEST:
        now["may_end_pass"] = 0
    else:
        now["sweep"] += 1
    now["sweep_offset"] = offset
    now["previous"] = -1


@kernel(ahead=False)
def note_page(page: int, first: int, offset: int, pages: PageCounts, counts: Counts) -> bool:
    """Count a page that comes.

    :param first: number of pages in the blocks before the page's
    :param offset: offset in the stream of its record
    :return: whether it belongs to a new pass; then it has not been counted, and must be noted again when the pass has been ended
    """
    now = counts[0]
    seen = np.int64(pages[page]["sweep"])
    # A page of this sweep that the order does not tell came on a channel of multifd. With a sweep of its own it is noted when it
    # is tried again, however often it comes.
    if first + page <= now["previous"] or seen == now["sweep"]:
        next_sweep(offset, counts)
    elif now["pass_offset"] < 0:
        now["pass_offset"] = offset
        now["sweep_offset"] = offset
    if now["may_end_pass"] != 0 and seen >= now["pass_first_sweep"]:
        return True
    now["previous"] = first + page
    note_sent(page, pages, counts)
    return False


@kernel(ahead=False)
def note_sent(page: int, pages: PageCounts, counts: Counts) -> None:
    """The current sweep sends a page."""
    pages[page]["sweep"] = np.uint32(counts[0]["sweep"])
    if pages[page]["times"] != np.uint32(_GREATEST):
        pages[page]["times"] += np.uint32(1)


@kernel(ahead=False)
def hold(page: int, held: Words, counts: Counts) -> None:
    """A page is put into memory."""
    bit = np.uint64(1) << np.uint64(page & 63)
    if held[page >> 6] & bit == np.uint64(0):
        counts[0]["held"] += 1
        held[page >> 6] |= bit


@kernel()
def count_records(
    staging: Bytes,
    at: int,
    end: int,
    name: Bytes,
    counts: Counts,
    block: BlockCounts,
    pages: PageCounts,
    ram: Bytes,
    held: Words,
    rows: Rows,
) -> tuple[int, int]:
    """Count the whole records in `staging[at:end]` that are of one block.

    :param name: the block's name; empty when none has been named yet
    :param pages: of the block
    :param ram: where pages go: as many bytes as the block has, or none if pages are not wanted
    :param held: a bit for each page of `ram` that has been written to
    :param rows: room for what `scan` finds
    :return: the position after the last record that was counted, and a `Status` or `NEW_PASS`
    """
    now = counts[0]
    page_bits = int(now["page_bits"])
    base = int(now["base"])
    first = int(block[0]["first"])
    while True:
        found, at, status, last = scan(staging, at, end, name, page_bits, pages.size, rows)
        for i in range(found):
            row = rows[i]
            kind = row["kind"]
            page = int(row["page"])
            start = int(row["at"])
            body = row["body"]
            after = body + row["size"]
            size = after - start
            if kind == _XBZRLE and pages[page]["sweep"] == np.uint32(0):
                return start, _UNSENT
            completes = kind == _XBZRLE and now["zero_before"] == first + page
            if not completes and note_page(page, first, base + start, pages, counts):
                return start, _NEW_PASS
            now["zero_before"] = first + page if kind == _ZERO else -1
            now["sweep_bytes"] += size
            target = ram[page << page_bits : (page + 1) << page_bits]
            if kind == _ZERO:
                now["sweep_zero"] += 1
                now["zero_bytes"] += size
                block[0]["zero"] += 1
                if ram.size > 0 and held[page >> 6] & (np.uint64(1) << np.uint64(page & 63)):
                    target[:] = 0
            elif kind == _PAGE:
                now["sweep_normal"] += 1
                block[0]["normal"] += 1
                if ram.size > 0:
                    hold(page, held, counts)
                    copy(target, staging[body:after])
            else:
                now["sweep_changed"] += 1
                now["changed_bytes"] += size
                block[0]["changed"] += 1
                if ram.size > 0:
                    hold(page, held, counts)
                    _apply(staging[body:after], target)
        if last >= 0 and pages[last]["sweep"] == np.uint32(0):
            status = _UNSENT
        if status == _END:
            now["zero_before"] = -1
        if status != _FULL:
            return at, status


@kernel()
def count_pages(numbers: NDArray[np.int64], done: int, counts: Counts, pages: PageCounts, held: Words) -> int:
    """Count pages of one block that come in any order within a sweep.

    :param numbers: all inside the block
    :param done: how many of them have been counted
    :param held: as for `count_records`, empty where pages are not wanted
    :return: how many have been counted now; fewer than all when the next belongs to a new pass
    """
    now = counts[0]
    for i in range(done, numbers.size):
        page = int(numbers[i])
        seen = np.int64(pages[page]["sweep"])
        if now["may_end_pass"] != 0 and now["pass_first_sweep"] <= seen < now["sweep"]:
            return i
        note_sent(page, pages, counts)
        if held.size > 0:
            hold(page, held, counts)
    return numbers.size
