"""What the channels of a multifd migration send, beside a survey of its main stream.

Wherever the main stream has the end of a part of its ram section, each channel has a packet with SYNC. So the stream falls
into epochs: a part of the main stream, and on each channel the packets up to the next SYNC. Within one no page comes
twice, so it does not matter that the channels' pages are looked at before those of the main stream.

A live source does not wait with its channels until what it wrote to the main stream has left its own buffer. So
channels are read whenever there is something on them, also while the main stream is waited for: whoever forwards
them could not forward more otherwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from sterna.analysis.ram_survey import RamSurveyor
from sterna.stream.multifd.compression import Decompressor
from sterna.stream.multifd.format import GROUP_BYTES, INIT_BYTES, Compression, PacketFormat, decode_init
from sterna.stream.reader import CommandPiece, StreamReader, StreamSource
from sterna.stream.wire import StreamError


@dataclass(frozen=True)
class ChannelInput:
    """Where a channel comes from.

    :ivar label: names it in errors
    """

    label: str
    source: StreamSource


class Channels(Protocol):
    """The channels of a stream."""

    def note(self, command: CommandPiece) -> None:
        """The main stream has a command, which may tell something of them."""
        return

    def sources(self) -> Sequence[ChannelInput]:
        """Those that there are by now; when the first part of the ram section has ended, all of them."""
        ...

    def wait(self, labels: Sequence[str], *, main: bool) -> str | None:
        """Wait until a channel or the main stream can be read without waiting; their end counts.

        :param labels: the channels that matter, at least one
        :param main: whether the main stream matters
        :return: a channel's label, or None for the main stream
        """
        ...

    def close(self) -> None:
        """Nothing more of any channel is wanted."""
        return


class StoredChannels(Channels):
    """Channels that are all there, so that nobody waits: they are read in their order, after the main stream.

    :param sources: the channels
    """

    def __init__(self, sources: Sequence[ChannelInput]) -> None:
        self._sources = sources

    def sources(self) -> Sequence[ChannelInput]:
        return self._sources

    def wait(self, labels: Sequence[str], *, main: bool) -> str | None:
        return None if main else labels[0]


@dataclass(frozen=True)
class ChannelSurvey:
    """One channel.

    :ivar id: its number, -1 if it broke before it said so
    :ivar bytes: how many were read
    :ivar packets: after the initial one
    :ivar pages: in all packets
    :ivar page_bytes: bytes that those take, compressed or not
    :ivar compression: of the packets with pages, by the names of the parameter ``multifd-compression``
    """

    label: str
    id: int
    bytes: int
    packets: int
    pages: int
    page_bytes: int
    compression: str


class _Channel:
    """Reads one channel.

    :ivar syncs: packets with SYNC so far
    """

    def __init__(self, given: ChannelInput, format: PacketFormat) -> None:
        self.label = given.label
        self.id = -1
        self.syncs = 0
        self._reader = StreamReader(given.source)
        self._format = format
        self._packets = self._pages = self._page_bytes = 0
        self._compression: Compression | None = None
        self._decompressor: Decompressor | None = None
        self._buffer = bytearray()

    def survey(self) -> ChannelSurvey:
        compression = self._compression.value if self._compression else ""
        return ChannelSurvey(
            self.label,
            self.id,
            self._reader.offset,
            self._packets,
            self._pages,
            self._page_bytes,
            compression,
        )

    def open(self) -> None:
        """Read the initial packet."""
        with _named(self.label, 0):
            self.id = decode_init(self._reader.take(INIT_BYTES)).id

    def read_rest(self) -> None:
        """Read what follows the last SYNC: packets, perhaps, but no pages."""
        while self._reader.peek(1):
            at = self._reader.offset
            with _named(self.label, at):
                packet = self._format.decode(self._reader.take(self._format.header_bytes))
                if packet.pages.size or packet.sync:
                    raise StreamError("a multifd packet after the end of guest RAM")
                self._packets += 1

    def read_packet(self, ram: RamSurveyor) -> None:
        """Read one packet, and put its pages where they belong."""
        at = self._reader.offset
        with _named(self.label, at):
            packet = self._format.decode(self._reader.take(self._format.header_bytes))
            self._packets += 1
            if packet.pages.size:
                data = self._read_data(packet.compression, packet.data_bytes)
                self._pages += packet.pages.size
                self._page_bytes += packet.data_bytes
                if packet.compression is not Compression.NONE:
                    data = self._inflate(
                        packet.compression, data, packet.pages.size << self._format.page_bits
                    )
                ram.take_packet(packet.block, packet.pages, data, self._reader.offset - at)
        self.syncs += packet.sync

    def _read_data(self, compression: Compression, size: int) -> bytes | memoryview:
        if self._compression not in (None, compression):
            raise StreamError(f"the compression changes to {compression.value}")
        self._compression = compression
        if len(self._buffer) < size:
            self._buffer = bytearray(max(size, GROUP_BYTES))
        view = memoryview(self._buffer)[:size]
        self._reader.take_into(view)
        return view

    def _inflate(self, compression: Compression, data: bytes | memoryview, size: int) -> bytes:
        if self._decompressor is None:
            self._decompressor = Decompressor(compression)
        return self._decompressor.decompress(data, size)


@contextmanager
def _named(label: str, offset: int) -> Iterator[None]:
    """Errors in the body of the `with` statement are those of a channel, of the packet at `offset` unless they say
    otherwise.
    """
    try:
        yield
    except StreamError as error:
        error.section = label
        if error.offset is None:
            error.offset = offset
        raise


class ChannelSurveyor:
    """Reads all channels, an epoch at a time.

    :param channels: where they come from
    :param page_bits: log2 of the stream's page size
    :param ram: where pages go
    """

    def __init__(self, channels: Channels, page_bits: int, ram: RamSurveyor) -> None:
        self._given = channels
        self._ram = ram
        self._format = PacketFormat(page_bits)
        self._channels: dict[str, _Channel] = {}
        self._epoch = 1
        self._begun = False

    def surveys(self) -> tuple[ChannelSurvey, ...]:
        """The channels so far."""
        return tuple(channel.survey() for channel in sorted(self._channels.values(), key=lambda c: c.id))

    def read_ahead(self, offset: int) -> None:
        """Read what there is of the epoch, until the main stream can be read.

        :param offset: offset in the main stream
        :raise StreamError: When a channel is broken.
        """
        while labels := self._unfinished():
            label = self._given.wait(labels, main=True)
            if label is None:
                return
            self._read(label, offset)

    def read_epoch(self, offset: int) -> None:
        """Read each channel up to its next SYNC; a part of the main stream's ram section follows.

        :param offset: offset in the main stream
        :raise StreamError: When a channel is broken.
        """
        for given in self._given.sources():
            if given.label not in self._channels:
                channel = self._channels[given.label] = _Channel(given, self._format)
                channel.open()
                if sum(other.id == channel.id for other in self._channels.values()) > 1:
                    text = f"there is a channel with the number {channel.id} already"
                    raise StreamError(text, given.label, 0)
        while labels := self._unfinished():
            label = self._given.wait(labels, main=False)
            assert label is not None
            self._read(label, offset)

    def end_epoch(self) -> None:
        """The part of the main stream has ended, and another will follow."""
        self._epoch += 1
        self._begun = False

    def _unfinished(self) -> list[str]:
        return [label for label, channel in self._channels.items() if channel.syncs < self._epoch]

    def _read(self, label: str, offset: int) -> None:
        if not self._begun:
            self._begun = True
            self._ram.begin_epoch(offset)
        self._channels[label].read_packet(self._ram)

    def close(self) -> None:
        """Read no more of any channel."""
        self._given.close()

    def read_end(self) -> None:
        """Read what is left of the channels when all of guest RAM has come.

        :raise StreamError: When it is anything that matters, or when a channel has been left out.
        """
        numbers = {channel.id for channel in self._channels.values()}
        for number in range(len(numbers)):
            if number not in numbers:
                text = f"channel {number} is missing; there is one with the number {max(numbers)}"
                raise StreamError(text, "multifd")
        for channel in self._channels.values():
            channel.read_rest()
