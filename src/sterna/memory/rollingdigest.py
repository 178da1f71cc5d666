"""The digest of guest RAM, kept up while RAM is still written, so that little is left for when the guest stands still.

A thread digests pieces that were written, and whoever learns of a write marks its piece as stale. The order makes it
right: a mark is set *after* the write that it tells of, and cleared *before* the piece is read. A digest that was made of
a piece while that was being written is thus marked again, and once nobody writes any more `finish` has them all.

Writes are learnt of late, by a harvest of the dirty log: one that has happened and is in no mark yet is in the log, and gets
its mark with the next harvest. So the last harvest comes before `finish`.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from numpy.typing import NDArray

from sterna.host.closing import Closing
from sterna.host.limits import usable_cpus
from sterna.memory.address import PAGE_SHIFT
from sterna.memory.bitmap import Words
from sterna.memory.digest import (
    CHUNK_SIZE,
    PIECE_SHIFT,
    PIECE_SIZE,
    PIECES_PER_CHUNK,
    BlockDigest,
    Digests,
    RamDigest,
    chunk_count,
    chunk_digest,
    piece_count,
    piece_digest,
    populated_pieces,
    zero_piece,
)
from sterna.memory.ram import RamBlock

Marks = NDArray[np.uint8]
"""One byte per piece, shape `(piece_count(size),)`: 0 while its digest holds. Writers set 1."""

_FRESH, _STALE, _RESTING = 0, 1, 2
_PAGES_OF_A_PIECE = np.dtype(f"u{(1 << PIECE_SHIFT - PAGE_SHIFT) // 8}")
"""As many bits as a piece has pages."""
_CATCH_UP_SHARE = 0.25
_CATCH_UP_SECONDS = 0.5
"""How long digests may take after a pass: this share of it, but no longer than that."""
_POLL_SECONDS = 0.03
_THREADS = 2
"""Most threads that `finish` has, where this process may use as many processors."""
_FEW = 64
"""Pieces that are not worth a second thread."""
_KEPT = 0.9


class _Block:
    """One RAM block's pieces."""

    def __init__(self, block: RamBlock, *, zero: bool) -> None:
        self.ram = block
        count = piece_count(block.size)
        self.pieces: Digests = np.full(count, zero_piece(), dtype=np.uint64)
        if rest := block.size % PIECE_SIZE:
            self.pieces[-1] = zero_piece(rest)
        self.marks: Marks = np.zeros(count, dtype=np.uint8)
        if not zero:
            self.marks[populated_pieces(block)] = _STALE
        self._chunks: Digests = np.full(chunk_count(block.size), _zero_chunk(), dtype=np.uint64)
        self._combined = np.ones(self._chunks.size, dtype=np.bool_)
        if block.size % CHUNK_SIZE:
            self._combined[-1] = False

    def renew(self, piece: int) -> None:
        self.marks[piece] = _FRESH
        self.pieces[piece] = piece_digest(self.ram, piece)
        self._combined[piece // PIECES_PER_CHUNK] = False

    def stale(self) -> NDArray[np.int64]:
        """Pieces to renew, those without memory set aside as the zeros that they are."""
        found = self._marked()
        empty = [piece for run in _runs(found) for piece in self._without_memory(run)]
        if not empty:
            return found
        for piece in empty:
            self.marks[piece] = _FRESH
            self.pieces[piece] = zero_piece(min(PIECE_SIZE, self.ram.size - (piece << PIECE_SHIFT)))
            self._combined[piece // PIECES_PER_CHUNK] = False
            # Written since the look at its memory?
            if populated_pieces(self.ram, piece, 1)[0]:
                self.marks[piece] = _STALE
        return self._marked()

    def _marked(self) -> NDArray[np.int64]:
        # By a comparison, which makes an array of its own: numpy counts what is not zero, makes room and fills it, and
        # raises when a writer sets a mark in between.
        return np.flatnonzero(self.marks != _FRESH)

    def _without_memory(self, pieces: NDArray[np.int64]) -> list[int]:
        first, last = int(pieces[0]), int(pieces[-1])
        populated = populated_pieces(self.ram, first, last + 1 - first)
        return list(pieces[~populated[pieces - first]].tolist())

    def resting(self) -> NDArray[np.int64]:
        """Pieces to renew that have not been written since the last call."""
        quiet = np.flatnonzero(self.marks == _RESTING)
        # A write in between is forgotten to be the later one of two, but not to have made the piece stale.
        self.marks[self.marks == _STALE] = _RESTING
        return quiet

    def combine(self) -> BlockDigest:
        for chunk in np.flatnonzero(~self._combined).tolist():
            first = chunk * PIECES_PER_CHUNK
            self._combined[chunk] = True
            self._chunks[chunk] = chunk_digest(self.pieces[first : first + PIECES_PER_CHUNK])
        return BlockDigest(self.ram.name, self.ram.size, self._chunks.copy())


@cache
def _zero_chunk() -> int:
    """Digest of a whole chunk that is all zero."""
    return chunk_digest(np.full(PIECES_PER_CHUNK, zero_piece(), dtype=np.uint64))


def _runs(pieces: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut where more than a chunk lies between two of them: what lies there need not be looked at."""
    if not pieces.size:
        return []
    return np.split(pieces, np.flatnonzero(np.diff(pieces) > PIECES_PER_CHUNK) + 1)


class RollingDigest(Closing):
    """Digests of RAM blocks, made in a thread from `start` on, and completed by `finish`.

    :param zero: whether the blocks are known to be zero now, as those of a machine that waits for its guest
    :param patient: whether a piece that is still being written is left alone for the time being
    """

    def __init__(self, blocks: Sequence[RamBlock], *, zero: bool = False, patient: bool = False) -> None:
        self._blocks = {block.name: _Block(block, zero=zero) for block in blocks}
        self._patient = patient
        self._threads = min(_THREADS, usable_cpus())
        self._piece_seconds = 0.0
        self._ended = False
        self._hurried = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    # -- while RAM is written ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to digest what is stale.

        :raise RuntimeError: When the host has no thread to spare.
        """
        thread = threading.Thread(target=self._run, name="rolling-digest", daemon=True)
        thread.start()
        self._thread = thread

    def marks(self, block: str) -> Marks:
        """Where a writer marks the pieces that it has written, after it has."""
        return self._blocks[block].marks

    def touch(self, block: str, words: Words) -> None:
        """Pages were written.

        :param words: bitmap of them
        """
        marks = self._blocks[block].marks
        marks[words.view(_PAGES_OF_A_PIECE)[: marks.size] != 0] = _STALE
        with self._changed:
            self._changed.notify_all()

    def catch_up(self, seconds: float) -> None:
        """Wait for the thread, which is not patient meanwhile, to have digested what is stale, but no longer than so many
        seconds.
        """
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self.stale_pieces or self._ended, seconds)
            self._hurried = False

    def catch_up_after(self, pass_seconds: float) -> None:
        """Wait so after a pass, in proportion to it: what is not digested before the guest stops would be waited for while it
        stands still.
        """
        self.catch_up(min(pass_seconds * _CATCH_UP_SHARE, _CATCH_UP_SECONDS))

    @property
    def stale_pieces(self) -> int:
        """Pieces whose digest does not hold."""
        return sum(int(np.count_nonzero(block.marks)) for block in self._blocks.values())

    def cost_seconds(self, pieces: int) -> float:
        """What digests of so many pieces took one thread lately; 0.0 when none has been made yet."""
        return pieces * self._piece_seconds

    def finish_seconds(self, pieces: int) -> float:
        """What `finish` would take with so many pieces left, at the pace of `cost_seconds`."""
        return self.cost_seconds(pieces) / self._threads_for(pieces)

    def _threads_for(self, pieces: int) -> int:
        return 1 if pieces <= _FEW else self._threads

    def _run(self) -> None:
        while not self._ended:
            found = 0
            for block in self._blocks.values():
                pieces = block.resting() if self._patient and not self._hurried else block.stale()
                found += pieces.size
                for _ in self._renew(block, pieces):
                    if self._ended:
                        return
                block.combine()
            with self._changed:
                self._changed.notify_all()
                if self._patient:
                    # Nobody tells of marks that are set in compiled code.
                    self._changed.wait_for(lambda: self._ended or self._hurried, _POLL_SECONDS)
                else:
                    self._changed.wait_for(lambda: self._ended or self.stale_pieces)

    def _renew(self, block: _Block, pieces: NDArray[np.int64]) -> Iterator[None]:
        before = time.perf_counter()
        for piece in pieces.tolist():
            block.renew(piece)
            now = time.perf_counter()
            took, before = now - before, now
            self._piece_seconds = (
                _KEPT * self._piece_seconds + (1 - _KEPT) * took if self._piece_seconds else took
            )
            yield

    # -- when it is not any more -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def finish(self, *, check: Callable[[], None] = lambda: None) -> RamDigest:
        """The digest of all of the blocks, to which nobody writes any more.

        :param check: called between pieces; what it raises (a cancellation) ends the work
        """
        self.close()
        stale = [(block, block.stale()) for block in self._blocks.values()]
        threads = self._threads_for(sum(pieces.size for _, pieces in stale))

        def run(first: int) -> None:
            for block, pieces in stale:
                for _ in self._renew(block, pieces[first::threads]):
                    check()

        if threads == 1:
            run(0)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="digest") as pool:
                for _ in pool.map(run, range(threads)):
                    pass
        return RamDigest(tuple(block.combine() for block in self._blocks.values()))


def digest_ram(blocks: Sequence[RamBlock], *, check: Callable[[], None] = lambda: None) -> RamDigest:
    """Digest all of `blocks`; nobody may write to them meanwhile.

    :param check: called between pieces; what it raises (a cancellation) ends the work
    """
    return RollingDigest(blocks).finish(check=check)
