"""What one direction of a connection forwards, for others to read beside it.

The forwarding thread receives into a ring of memory and sends from it; readers follow in threads of their own, each at its
own pace. Nobody waits for a reader that keeps up. One that has fallen behind by the whole ring holds the forwarding
up, which is counted; one that does not move at all for a while is left behind. The ring takes memory as it is filled, and gives
it back when nothing more comes and nobody reads.
"""

import mmap
import threading
import time
from bisect import bisect_right
from collections.abc import Callable

from sterna.migration.channels.sockets import VANISHED_SECONDS
from sterna.migration.errors import MigrationError
from sterna.stream.multifd.format import INIT_BYTES

RING_BYTES = 16 << 20
ROOM_BYTES = 512 << 10
"""Most bytes that are received at once."""
HEAD_BYTES = INIT_BYTES
"""As many as it takes to tell what any connection carries: the longest are those of a channel of multifd."""
PATIENCE_SECONDS = VANISHED_SECONDS / 2
"""How long a reader may hold the forwarding up without reading a byte: the source must not take it for the destination's end."""
_MARK_BYTES = 4 << 10
_MARKS = 4096


class LeftBehind(MigrationError, OSError):
    """A reader was too slow, and what it has not read is gone."""


class TeeReader:
    """One reader, as a `StreamSource`.

    :ivar position: offset of the next byte
    """

    def __init__(self, tee: "Tee") -> None:
        self._tee = tee
        self.position = 0

    def readinto(self, buffer: memoryview) -> int:
        """
        :raise LeftBehind: When this reader was left behind.
        """
        return self._tee.read(self, buffer)

    @property
    def ready(self) -> bool:
        """Whether `readinto` would not wait."""
        return self._tee.is_ready(self)

    def close(self) -> None:
        """Read no more."""
        self._tee.detach(self)


class Tee:
    """A ring between a forwarding thread and readers.

    :ivar head: the first bytes, up to `HEAD_BYTES`
    :ivar stalled_seconds: how long the forwarding has been held up by readers
    :ivar forwarded: bytes so far
    :ivar last_ns: CLOCK_MONOTONIC when the last of them were forwarded
    """

    def __init__(
        self,
        ring_bytes: int = RING_BYTES,
        patience_seconds: float = PATIENCE_SECONDS,
        bell: Callable[[], None] = lambda: None,
    ) -> None:
        """
        :param bell: called whenever there is more to read, or no more will come
        """
        self._bell = bell
        self.head = b""
        self.stalled_seconds = 0.0
        self.forwarded = 0
        self.last_ns = 0
        self._view = memoryview(mmap.mmap(-1, ring_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._patience = patience_seconds
        self._changed = threading.Condition()
        self._readers: list[TeeReader] = []
        self._ended = False
        # Offset `_base` of the stream is the ring's first byte.
        self._base = 0
        self._mark_bytes = _MARK_BYTES
        self._marks: list[tuple[int, int]] = []

    # -- the forwarding thread -------------------------------------------------------------------------------

    def room(self) -> memoryview:
        """Where to receive the next bytes. Waits for readers that are behind by all of the ring."""
        size = len(self._view)
        with self._changed:
            if self._slowest() == self.forwarded:
                # Everybody is up to date: the memory used last is still in the cache.
                self._base = self.forwarded
            if self.forwarded - self._slowest() == size:
                started = time.monotonic()
                while self.forwarded - (slowest := self._slowest()) == size:
                    if not self._changed.wait_for(lambda: self._slowest() != slowest, self._patience):
                        self._readers = [r for r in self._readers if r.position != slowest]
                        self._changed.notify_all()
                self.stalled_seconds += time.monotonic() - started
            at = (self.forwarded - self._base) % size
            free = size - (self.forwarded - self._slowest())
            return self._view[at : min(at + min(free, ROOM_BYTES), size)]

    def commit(self, size: int) -> None:
        """The next `size` bytes of the room have been forwarded."""
        now = time.monotonic_ns()
        with self._changed:
            if len(self.head) < HEAD_BYTES:
                at = (self.forwarded - self._base) % len(self._view)
                self.head += bytes(self._view[at : at + min(size, HEAD_BYTES - len(self.head))])
            if not self._marks or self.forwarded - self._marks[-1][0] >= self._mark_bytes:
                self._mark(now)
            self.forwarded += size
            self.last_ns = now
            self._changed.notify_all()
        self._bell()

    def end(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self._ended = True
            self._give_back()
            self._changed.notify_all()
        self._bell()

    def _give_back(self) -> None:
        """With the lock held. The memory is freed when nobody holds a view of it any more."""
        if self._ended and not self._readers:
            self._view = memoryview(b"")

    def _slowest(self) -> int:
        return min((reader.position for reader in self._readers), default=self.forwarded)

    def _mark(self, now: int) -> None:
        self._marks.append((self.forwarded, now))
        if len(self._marks) > _MARKS:
            del self._marks[1::2]
            self._mark_bytes *= 2

    # -- readers ---------------------------------------------------------------------------------------------

    def attach(self) -> TeeReader:
        """A reader of everything; before the first byte."""
        with self._changed:
            assert not self.forwarded
            reader = TeeReader(self)
            self._readers.append(reader)
            return reader

    def detach(self, reader: TeeReader) -> None:
        """A reader reads no more."""
        with self._changed:
            self._readers = [other for other in self._readers if other is not reader]
            self._give_back()
            self._changed.notify_all()

    def read(self, reader: TeeReader, buffer: memoryview) -> int:
        """Bytes for a reader; waits for at least one. 0 at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_ready(reader))
            if reader not in self._readers:
                raise LeftBehind("whoever looked at the stream fell too far behind it")
            view = self._view
            at = (reader.position - self._base) % len(view)
            size = min(self.forwarded - reader.position, len(buffer), len(view) - at)
        # The forwarding thread does not touch what this reader has not passed.
        buffer[:size] = view[at : at + size]
        with self._changed:
            reader.position += size
            self._changed.notify_all()
        return size

    def is_ready(self, reader: TeeReader) -> bool:
        """Whether there is something for a reader, if only that nothing more comes."""
        return reader.position < self.forwarded or self._ended or reader not in self._readers

    def time_at(self, offset: int) -> int:
        """About when the byte at an offset was forwarded: CLOCK_MONOTONIC in ns, 0 before the first byte."""
        with self._changed:
            if not self._marks:
                return 0
            if offset >= self.forwarded:
                return self.last_ns
            return self._marks[max(0, bisect_right(self._marks, (offset, 1 << 63)) - 1)][1]
