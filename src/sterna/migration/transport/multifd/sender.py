"""Multifd at the source: whole pages go on channels of their own, several at once.

The main channel has the marks of pages that are zero and, with XBZRLE, what changed in pages. What must stay in
order is separated by EOS in the main stream and SYNC on each channel: the destination takes nothing that comes after them
before it has everything that comes before. A page is sent at most once between two of them.
"""

import itertools
import select
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sterna.memory.address import PAGE_SHIFT
from sterna.memory.bitmap import PageNumbers
from sterna.memory.content import Bytes
from sterna.memory.ram import RamBlock
from sterna.memory.vectors import Vectors, vectors_of
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.uri import ListeningUri
from sterna.migration.errors import ChannelError, ConnectionRefused
from sterna.migration.transport.multifd.channel import SendChannel
from sterna.migration.transport.multifd.jobs import Group, Jobs, Packets
from sterna.migration.transport.ratelimit import RateLimiter
from sterna.migration.transport.records import PART, PART_END, SECTION_END, send_paced
from sterna.migration.transport.sender import Transport
from sterna.stream.multifd import kernels
from sterna.stream.multifd.compression import compressor
from sterna.stream.multifd.format import NO_TOKEN, NO_UUID, Compression, Init, Packet, PacketFormat
from sterna.stream.multifd.packets import IN_THE_BLOCK, head_of, packets_of
from sterna.stream.ram.encoder import Batch, stream_pages, zero_records
from sterna.stream.xbzrle.cache import XbzrleCache

_PACKETS_PER_JOB = 8
"""Packets in one go, where they are not compressed: a channel is busy for a ms or two with 4 MiB then."""
_JOBS_PER_CHANNEL = 2
_HELD_BYTES = 64 << 10
"""Records of the last pass that go with the end of the section."""
_ROUND_SECONDS = 1.0
"""A part of the ram section lasts no longer, so that the destination hears of both kinds of channels."""


@dataclass(frozen=True)
class MultifdSettings:
    """:ivar channels: 1 to 255
    :ivar level: of the compression, where there is one
    :ivar uuid: of the machine, 16 bytes; zeros when it has none
    :ivar token: of this migration's channels, 16 bytes
    """

    channels: int
    compression: Compression = Compression.NONE
    level: int = 0
    uuid: bytes = NO_UUID
    token: bytes = NO_TOKEN


class MultifdTransport(Transport):
    """It connects when it is made; the main channel has been connected before.

    :raise ChannelError: When a channel cannot be connected.
    :raise Cancelled: When the migration is cancelled meanwhile.
    """

    encodes_first_pass = False

    def __init__(
        self,
        main: Channel,
        uri: ListeningUri,
        settings: MultifdSettings,
        limiter: RateLimiter,
        page_bits: int,
        cancellation: Cancellation,
    ) -> None:
        self._main = main
        self._limiter = limiter
        self._page_bits = page_bits
        self._jobs = Jobs(settings.channels, _JOBS_PER_CHANNEL * settings.channels)
        self._format = PacketFormat(page_bits)
        self._compresses = settings.compression is not Compression.NONE
        self._packets_per_job = 1 if self._compresses else _PACKETS_PER_JOB
        self._heads: dict[str, Bytes] = {}
        self._numbers = itertools.count()
        self._in_part = False
        self._in_round = False
        self._round_began = 0.0
        self._held = bytearray()
        self._channels: list[SendChannel] = []
        # One look at all channels: the guest may stand still.
        self._incoming = select.poll()
        self._by_fd: dict[int, SendChannel] = {}
        try:
            for index in range(settings.channels):
                channel = _connect(uri, index, cancellation)
                coder = None
                if self._compresses:
                    coder = compressor(settings.compression, settings.level)
                self._channels.append(
                    SendChannel(
                        index,
                        channel,
                        self._jobs,
                        self._format,
                        self._numbers,
                        settings.compression,
                        coder,
                        limiter,
                        cancellation,
                    )
                )
                fd, _ = channel.descriptors()
                self._incoming.register(fd, select.POLLIN)
                self._by_fd[fd] = self._channels[-1]
                _introduce(channel, Init(settings.uuid, index, settings.token))
            for sending in self._channels:
                sending.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._jobs.end()
        for sending in self._channels:
            sending.close()

    # -- the ram section ---------------------------------------------------------------------------------------

    def send_setup(self, data: bytes) -> int:
        self._main.send(data)
        self._jobs.mark()
        return len(data)

    def send_end(self) -> int:
        size = 0
        if self._in_part:
            self._sync()
            self._main.send(PART_END)
            size = len(PART_END)
        self._sync()
        end = SECTION_END + bytes(self._held) + PART_END
        self._main.send(end)
        return size + len(end)

    def begin(self, now: float) -> int:
        size = self._end_round() if self._in_round and now >= self._round_began + _ROUND_SECONDS else 0
        if not self._in_round:
            self._in_round = True
            self._round_began = now
        return size

    def send_untouched(self, batch: Batch, *, final: bool) -> int:
        return self._send_zero(batch.block, stream_pages(batch.pages, self._page_bits), final)

    def send_whole(self, batch: Batch, *, final: bool) -> tuple[int, int]:
        pages = stream_pages(batch.pages, self._page_bits)
        zero, whole = np.empty_like(pages), np.empty_like(pages)
        zeros = kernels.split_zero(batch.block.data.view(np.uint64), pages, self._page_bits, zero, whole)
        size = self._send_zero(batch.block, zero[:zeros], final)
        self._hand_out(batch.block, whole[: pages.size - zeros], IN_THE_BLOCK, final)
        return size, zeros >> (PAGE_SHIFT - self._page_bits)

    def encode(
        self, cache: XbzrleCache, batch: Batch, number: int, *, final: bool
    ) -> tuple[int, int, Callable[[], int]]:
        changes = cache.encode_apart(batch, number, keep=not final)

        def send() -> int:
            size = self._send_records(changes.records, final)
            self._hand_out(batch.block, changes.pages, changes.sources, final)
            return size

        return changes.zero, changes.saved, send

    def finish_pass(self, *, final: bool) -> int:
        # The section's end is that of the last round as well: each costs the stopped guest a SYNC on every channel.
        size = 0 if final else self._end_round()
        self._jobs.drain()
        for fd, _ in self._incoming.poll(0):
            self._by_fd[fd].check_open()
        return size

    def take_apart_bytes(self) -> int:
        return self._jobs.take_sent_bytes()

    def unsent_bytes(self) -> int:
        return self._main.unsent_bytes() + sum(sending.channel.unsent_bytes() for sending in self._channels)

    def waited_seconds(self) -> float:
        return self._main.waited_seconds + sum(sending.channel.waited_seconds for sending in self._channels)

    # -- inside ------------------------------------------------------------------------------------------------

    def _end_round(self) -> int:
        """What was handed out is in place at the destination before anything that comes now."""
        if not self._in_round:
            return 0
        end = (b"" if self._in_part else PART) + bytes(self._held) + PART_END
        self._in_round = self._in_part = False
        self._held.clear()
        self._jobs.mark()
        self._main.send(end)
        return len(end)

    def _sync(self) -> None:
        """As `Jobs.mark`, for a guest that stands still: this thread writes to all channels before those of each are awake."""
        self._jobs.drain()
        header = self._format.encode(Packet(sync=True, number=next(self._numbers)))
        for sending in self._channels:
            sending.channel.send(header)
        self._jobs.marked(len(header) * len(self._channels))

    def _send_zero(self, block: RamBlock, pages: PageNumbers, final: bool) -> int:
        return self._send_records(zero_records(block, pages, self._page_bits), final) if pages.size else 0

    def _send_records(self, records: bytes, final: bool) -> int:
        if not records:
            return 0
        if final and not self._in_part and len(self._held) + len(records) <= _HELD_BYTES:
            self._held += records
            return 0
        data = records if self._in_part else PART + bytes(self._held) + records
        self._held.clear()
        self._in_part = True
        send_paced(self._main, vectors_of(data), self._limiter, final=final)
        return len(data)

    def _hand_out(self, block: RamBlock, pages: PageNumbers, sources: Vectors, final: bool) -> None:
        """Give whole pages to the channels.

        :param sources: where the pages are, unless they are `IN_THE_BLOCK`
        """
        pages_per_job = self._format.pages * self._packets_per_job
        for first in range(0, pages.size, pages_per_job):
            last = first + pages_per_job
            self._put(block, pages[first:last], sources[first:last], final)

    def _put(self, block: RamBlock, pages: PageNumbers, sources: Vectors, final: bool) -> None:
        count = -(-pages.size // self._format.pages)
        number = next(self._numbers)
        for _ in range(1, count):
            next(self._numbers)
        if not self._compresses:
            vectors, headers = packets_of(self._format, self._head(block), block, pages, sources, number)
            self._jobs.put(Packets(vectors, headers, final))
            return
        vectors = np.empty((pages.size, 2), dtype=np.uint64)
        rows = kernels.gather_pages(pages, block.hva, self._page_bits, sources, vectors, 0)
        self._jobs.put(Group(block, pages, vectors[:rows], number, final))

    def _head(self, block: RamBlock) -> Bytes:
        if block.name not in self._heads:
            self._heads[block.name] = head_of(self._format, block)
        return self._heads[block.name]


def _introduce(channel: Channel, init: Init) -> None:
    try:
        channel.send(init.encode())
    except ChannelError as error:
        # QEMU takes one connection when its multifd is off, and drops the others.
        raise ChannelError(f"{error}; {_HINT}") from error


_HINT = "is the capability multifd on at the destination?"


def _connect(uri: ListeningUri, index: int, cancellation: Cancellation) -> Channel:
    try:
        channel = uri.connect(cancellation)
    except ConnectionRefused as error:
        raise ChannelError(f"multifd channel {index}: {error}; {_HINT}") from error
    except ChannelError as error:
        raise ChannelError(f"multifd channel {index}: {error}") from error
    channel.peer = f"multifd channel {index} of {uri}"
    return channel
