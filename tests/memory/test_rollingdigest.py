"""The digest that is kept up while RAM is written equals that of all bytes, whatever was written when."""

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.memory import rollingdigest
from sterna.memory.address import PAGE_SIZE
from sterna.memory.bitmap import Words, new_bitmap, set_bits
from sterna.memory.digest import CHUNK_SIZE, PIECE_SIZE, PIECES_PER_CHUNK, populated_pieces
from sterna.memory.ram import RamBlock
from sterna.memory.rollingdigest import RollingDigest, digest_ram

SECONDS = 300
PAGES_PER_PIECE = PIECE_SIZE // PAGE_SIZE
SIZE = CHUNK_SIZE + 5 * PIECE_SIZE + 3 * PAGE_SIZE


def pages(*numbers: int) -> Words:
    words = new_bitmap(4 * CHUNK_SIZE // PAGE_SIZE)
    set_bits(words, np.array(numbers, dtype=np.uint64))
    return words


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, SIZE // PAGE_SIZE - 1), st.integers(0, 255)), max_size=6),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_after_any_writes_it_is_the_digest_of_all_bytes(
    rounds: list[list[tuple[int, int]]], running: bool
) -> None:
    with RamBlock("a", SIZE, huge_pages=False) as block, RollingDigest([block]) as rolling:
        if running:
            rolling.start()
        for writes in rounds:
            for page, value in writes:
                block.data[page * PAGE_SIZE + 7] = value
            # As a look at the dirty log tells of them: later, and all at once.
            rolling.touch("a", pages(*(page for page, _ in writes)))
        found = rolling.finish()
        assert not rolling.stale_pieces
        assert found.hex == digest_ram([block]).hex


def test_a_write_that_nobody_tells_of_is_missed_until_it_is_told() -> None:
    """So a look at the dirty log must follow the last write."""
    with RamBlock("a", SIZE) as block:
        block.data[:] = 1
        rolling = RollingDigest([block])
        rolling.start()
        rolling.catch_up(SECONDS)
        block.data[3 * PIECE_SIZE] = 2
        assert rolling.stale_pieces == 0
        rolling.touch("a", pages(3 * PAGES_PER_PIECE))
        assert rolling.finish().hex == digest_ram([block]).hex


def test_a_piece_written_while_it_is_digested_is_digested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from sterna.memory import rollingdigest

    plain = rollingdigest.piece_digest
    with RamBlock("a", PIECE_SIZE) as block:
        block.data[:] = 1
        rolling = RollingDigest([block])
        torn = []

        def write_after_reading(ram: RamBlock, piece: int) -> int:
            digest = plain(ram, piece)
            if not torn:
                torn.append(digest)
                block.data[-1] = 2
                rolling.touch("a", pages(PAGES_PER_PIECE - 1))
            return digest

        monkeypatch.setattr(rollingdigest, "piece_digest", write_after_reading)
        rolling.start()
        rolling.catch_up(SECONDS)
        found = rolling.finish()
        assert torn
        assert found.hex == digest_ram([block]).hex


def test_what_is_caught_up_with_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from sterna.memory import rollingdigest

    plain, read = rollingdigest.piece_digest, []
    monkeypatch.setattr(
        rollingdigest, "piece_digest", lambda ram, piece: read.append(piece) or plain(ram, piece)
    )
    with RamBlock("a", 2 * CHUNK_SIZE) as block:
        block.data[:] = 1
        with RollingDigest([block]) as rolling:
            rolling.start()
            rolling.catch_up(SECONDS)
            assert sorted(read) == list(range(2 * PIECES_PER_CHUNK))
            read.clear()
            block.data[20 * PIECE_SIZE] = 9
            rolling.touch("a", pages(20 * PAGES_PER_PIECE))
            rolling.finish()
            assert read == [20]


def test_zero_memory_is_neither_read_nor_made() -> None:
    with RamBlock("a", 4 * CHUNK_SIZE, huge_pages=False) as block:
        rolling = RollingDigest([block], zero=True)
        # A page of zeros came and was not written: its mark is a false alarm.
        rolling.touch("a", pages(0, 600))
        assert rolling.finish().hex == digest_ram([block]).hex
        assert not populated_pieces(block).any()


def test_pieces_that_are_still_written_wait_when_it_is_patient() -> None:
    with RamBlock("a", 4 * PIECE_SIZE) as block, RollingDigest([block], zero=True, patient=True) as rolling:
        marks, inner = rolling.marks("a"), rolling._blocks["a"]
        block.data[:] = 5
        marks[:] = 1
        look, rested = inner.resting, threading.Event()

        def look_after_a_write() -> Any:
            block.data[0] ^= 1
            marks[0] = 1
            quiet = look()
            if not marks[1:].any():
                rested.set()
            return quiet

        inner.resting = look_after_a_write  # type: ignore[method-assign]
        rolling.start()
        assert rested.wait(SECONDS)
        assert marks[0], "the first piece never comes to rest"
        rolling.catch_up(SECONDS)
        assert not marks.any()
        assert rolling.finish().hex == digest_ram([block]).hex


class Written(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    """Marks to which a writer writes between the two reads of whoever looks for those that are set."""

    def nonzero(self) -> tuple[Any, ...]:
        if np.shares_memory(self, self.marks):
            raise RuntimeError("number of non-zero array elements changed during function execution")
        return super().nonzero()

    def __array_finalize__(self, made_of: Any) -> None:
        self.marks = getattr(made_of, "marks", self)


@pytest.mark.parametrize("patient", [False, True])
def test_marks_may_be_set_while_they_are_looked_for(patient: bool) -> None:
    with RamBlock("a", 4 * PIECE_SIZE) as block:
        block.data[:] = 1
        rolling = RollingDigest([block], zero=True, patient=patient)
        inner = rolling._blocks["a"]
        inner.marks = inner.marks.view(Written)
        with pytest.raises(RuntimeError, match="changed during"):
            np.flatnonzero(inner.marks)
        with rolling:
            rolling.marks("a")[:] = 1
            rolling.start()
            rolling.catch_up(SECONDS)
            assert not rolling.stale_pieces, "the thread goes on"
            assert rolling.finish().hex == digest_ram([block]).hex


def test_a_check_that_raises_ends_the_work() -> None:
    def check() -> None:
        raise TimeoutError

    with RamBlock("a", 2 * CHUNK_SIZE) as block, RollingDigest([block]) as rolling:
        block.data[:] = 1
        rolling.touch("a", pages(*range(0, 1024, 16)))
        with pytest.raises(TimeoutError):
            rolling.finish(check=check)


@pytest.mark.parametrize("cpus", [1, 2, 3])
def test_many_pieces_are_finished_by_two_threads_where_there_are_two_processors(
    cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollingdigest, "usable_cpus", lambda: cpus)
    with RamBlock("a", CHUNK_SIZE) as block:
        block.data[:] = 1
        rolling = RollingDigest([block])
        rolling.finish()
        assert rolling.cost_seconds(1) > 0
        assert rolling.finish_seconds(10) == rolling.cost_seconds(10)
        assert rolling.finish_seconds(1000) == rolling.cost_seconds(1000) / min(cpus, 2)
