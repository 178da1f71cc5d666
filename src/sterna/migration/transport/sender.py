"""How the pages of a pass leave the source: what every way has in common, and the plain one, as records in the main
stream.
"""

import time
from dataclasses import dataclass
from typing import Protocol

from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE
from sterna.memory.vectors import Vectors, vectors_of
from sterna.migration.channels.channel import Channel
from sterna.migration.transport.ratelimit import RateLimiter, cut
from sterna.stream import sections
from sterna.stream.ram.encoder import Batch, encode_pages, untouched_records
from sterna.stream.ram.setup import END_OF_RECORDS
from sterna.stream.xbzrle.cache import XbzrleCache

RAM_ID = 1
"""Number of the ram section in our streams."""
_LARGEST_PIECE = 8 << 20
_SLOW = 400_000_000
"""Bytes per second: below this a limit leaves time for encoding."""
_SPARE = 0.5
"""So does a link, or a destination, that is waited for this share of the time."""
PART = sections.section_part(RAM_ID)
SECTION_END = sections.section_end(RAM_ID)
"""Begins the section's last part, which `PART_END` ends as every other."""
PART_END = END_OF_RECORDS + sections.footer(RAM_ID)


@dataclass(frozen=True)
class Sent:
    """What became of pages.

    :ivar size: bytes on the wire that were handed to the kernel
    :ivar pages: pages of 4 KiB taken
    :ivar zero_pages: those that went as a mark
    :ivar saved_pages: those that went as what changed, or not at all because nothing did
    :ivar seconds: how long it took, pacing included
    :ivar encode_seconds: how much of it was spent before the first byte left
    :ivar encode_cpu_seconds: the processor's part of that: what it would have been with a processor to itself
    :ivar multifd_bytes: how much of `size` went on multifd channels
    """

    size: int
    pages: int = 0
    zero_pages: int = 0
    saved_pages: int = 0
    seconds: float = 0.0
    encode_seconds: float = 0.0
    encode_cpu_seconds: float = 0.0
    multifd_bytes: int = 0


class PageSender(Protocol):
    """A way for the ram section to the destination. One thread calls it.

    Whatever goes wrong raises `ChannelError`; a cancellation raises `Cancelled`.
    """

    def send_setup(self, data: bytes) -> Sent:
        """Send the section's first part, which has no pages but an EOS."""
        ...

    def send_end(self) -> Sent:
        """Send the section's last part. All that was taken is before it."""
        ...

    def send_batch(self, batch: Batch, number: int, *, final: bool) -> Sent:
        """Send pages. They are read at some time between the call and the end of the pass.

        :param number: of the pass
        :param final: whether the guest is stopped; then nothing is paced
        """
        ...

    def finish_pass(self, *, final: bool) -> Sent:
        """Everything that was taken has been handed to the kernel on return; what `send_end` is to send does not count."""
        ...

    def unsent_bytes(self) -> int:
        """Bytes that were handed to the kernel and are known not to have arrived yet."""
        ...

    def waited_seconds(self) -> float:
        """How long the kernel had no room for more, in all."""
        ...

    def send_whole(self) -> None:
        """From now on no page is sent as what changed in it."""
        ...

    def close(self) -> None:
        """Let go of channels of its own."""
        ...


class RecordSender:
    """Each batch is a part of the ram section, on the main channel.

    :param cache: for XBZRLE, None without
    :param page_bits: log2 of the stream's page size
    """

    def __init__(
        self, channel: Channel, limiter: RateLimiter, cache: XbzrleCache | None, page_bits: int
    ) -> None:
        self._channel = channel
        self._limiter = limiter
        self._cache = cache
        self._page_bits = page_bits
        self._seconds = 0.0

    def send_setup(self, data: bytes) -> Sent:
        self._channel.send(data)
        return Sent(len(data))

    def send_end(self) -> Sent:
        end = SECTION_END + PART_END
        self._channel.send(end)
        return Sent(len(end))

    def send_batch(self, batch: Batch, number: int, *, final: bool) -> Sent:
        started = encoded_at = time.monotonic()
        cpu, encode_cpu = time.thread_time(), 0.0
        pages, saved_pages = int(batch.pages.size), 0
        if batch.untouched:
            data = untouched_records(batch.block, batch.pages, PART, PART_END, self._page_bits)
            send_paced(self._channel, vectors_of(data), self._limiter, final=final)
            size, zero_pages = len(data), pages
        elif self._cache is not None and (number > 1 or self._is_worth_encoding(self._cache, batch)):
            changes = self._cache.encode(batch, number, prefix=PART, suffix=PART_END, keep=not final)
            encoded_at, encode_cpu = time.monotonic(), time.thread_time() - cpu
            send_paced(self._channel, changes.iov, self._limiter, final=final)
            size, zero_pages, saved_pages = changes.nbytes, changes.zero, changes.saved
        else:
            encoded = encode_pages(
                batch.block, batch.pages, prefix=PART, suffix=PART_END, page_bits=self._page_bits
            )
            send_paced(self._channel, encoded.iov, self._limiter, final=final)
            size, zero_pages = encoded.nbytes, encoded.duplicate >> (PAGE_SHIFT - self._page_bits)
        now = time.monotonic()
        self._seconds += now - started
        return Sent(size, pages, zero_pages, saved_pages, now - started, encoded_at - started, encode_cpu)

    def finish_pass(self, *, final: bool) -> Sent:
        return Sent(0)

    def send_whole(self) -> None:
        self._cache = None

    def _is_worth_encoding(self, cache: XbzrleCache, batch: Batch) -> bool:
        """Whether pages of the first pass are: there is time for it, or they become much smaller."""
        if not cache.from_start:
            return False
        waited = self._limiter.waited_seconds + self._channel.waited_seconds
        spare = 0 < self._limiter.rate < _SLOW or waited > self._seconds * _SPARE
        return spare or cache.looks_sparse(batch)

    def unsent_bytes(self) -> int:
        return self._channel.unsent_bytes()

    def waited_seconds(self) -> float:
        return self._channel.waited_seconds

    def close(self) -> None:
        pass


def send_paced(channel: Channel, vectors: Vectors, limiter: RateLimiter, *, final: bool) -> int:
    """Send a gather list, in pieces that the limiter can pace.

    :param vectors: as in `Channel.send_vectors`
    :param final: whether the guest waits for it: the limit does not hold then, as in QEMU
    :return: bytes sent
    """
    sent = 0
    while not final and limiter.rate and len(vectors):
        piece, vectors = cut(vectors, limiter.piece_bytes(PAGE_SIZE, _LARGEST_PIECE))
        limiter.pace(int(piece[:, 1].sum()))
        sent += channel.send_vectors(piece)
    return sent + channel.send_vectors(vectors)
