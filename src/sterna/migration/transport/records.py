"""Pages as records on the main channel: each batch is a part of the ram section."""

from collections.abc import Callable

from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE
from sterna.memory.vectors import Vectors, vectors_of
from sterna.migration.channels.channel import Channel
from sterna.migration.transport.ratelimit import RateLimiter, cut
from sterna.migration.transport.sender import Transport
from sterna.stream import sections
from sterna.stream.ram.encoder import Batch, encode_pages, stream_pages, zero_records
from sterna.stream.ram.setup import END_OF_RECORDS
from sterna.stream.xbzrle.cache import XbzrleCache

RAM_ID = 1
"""Number of the ram section in our streams."""
_LARGEST_PIECE = 8 << 20
PART = sections.section_part(RAM_ID)
SECTION_END = sections.section_end(RAM_ID)
"""Begins the section's last part, which `PART_END` ends as every other."""
PART_END = END_OF_RECORDS + sections.footer(RAM_ID)


class RecordTransport(Transport):
    """:param page_bits: log2 of the stream's page size"""

    def __init__(self, channel: Channel, limiter: RateLimiter, page_bits: int) -> None:
        self._channel = channel
        self._limiter = limiter
        self._page_bits = page_bits

    def send_setup(self, data: bytes) -> int:
        self._channel.send(data)
        return len(data)

    def send_end(self) -> int:
        end = SECTION_END + PART_END
        self._channel.send(end)
        return len(end)

    def send_untouched(self, batch: Batch, *, final: bool) -> int:
        pages = stream_pages(batch.pages, self._page_bits)
        data = b"".join((PART, zero_records(batch.block, pages, self._page_bits), PART_END))
        return self._send(vectors_of(data), final)

    def send_whole(self, batch: Batch, *, final: bool) -> tuple[int, int]:
        encoded = encode_pages(
            batch.block, batch.pages, prefix=PART, suffix=PART_END, page_bits=self._page_bits
        )
        size = self._send(encoded.iov, final)
        return size, encoded.duplicate >> (PAGE_SHIFT - self._page_bits)

    def encode(
        self, cache: XbzrleCache, batch: Batch, number: int, *, final: bool
    ) -> tuple[int, int, Callable[[], int]]:
        changes = cache.encode(batch, number, prefix=PART, suffix=PART_END, keep=not final)
        return (changes.zero, changes.saved, lambda: self._send(changes.iov, final))

    def unsent_bytes(self) -> int:
        return self._channel.unsent_bytes()

    def waited_seconds(self) -> float:
        return self._channel.waited_seconds

    def _send(self, vectors: Vectors, final: bool) -> int:
        return send_paced(self._channel, vectors, self._limiter, final=final)


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
