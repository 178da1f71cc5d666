"""What the channels of a multifd migration send, beside a survey of its main stream.

Wherever the main stream has the end of a part of its ram section, each channel has a packet with SYNC. So the stream falls
into epochs: a part of the main stream, and on each channel the packets up to the next SYNC. Within one no page comes
twice, so it does not matter that the channels' pages are looked at before those of the main stream.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sterna.stream import multifd
from sterna.stream.multifd import Compression, PacketFormat
from sterna.stream.pagecompression import Decompressor, decompressor
from sterna.stream.ram_survey import RamSurveyor
from sterna.stream.reader import StreamReader, StreamSource
from sterna.stream.wire import StreamError


@dataclass(frozen=True)
class ChannelSource:
    """Where a channel comes from.

    :ivar label: names it in errors
    """

    label: str
    source: StreamSource


Channels = Callable[[], Sequence[ChannelSource]]
"""The channels that there are by now. They are asked for whenever an epoch begins, all of them each time; before the
first ends all should be there.
"""


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

    def __init__(self, given: ChannelSource, format: PacketFormat) -> None:
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
            self.id = multifd.decode_init(self._reader.take(multifd.INIT_BYTES)).id

    def read_until(self, syncs: int, ram: RamSurveyor) -> None:
        """Read on until there have been so many packets with SYNC."""
        while self.syncs < syncs:
            self._read_packet(ram)

    def read_rest(self) -> None:
        """Read what follows the last SYNC: packets, perhaps, but no pages."""
        while self._reader.peek(1):
            at = self._reader.offset
            with _named(self.label, at):
                packet = self._format.decode(self._reader.take(self._format.header_bytes))
                if packet.pages.size or packet.sync:
                    raise StreamError("a multifd packet after the end of guest RAM")
                self._packets += 1

    def _read_packet(self, ram: RamSurveyor) -> None:
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
            self._buffer = bytearray(max(size, multifd.GROUP_BYTES))
        view = memoryview(self._buffer)[:size]
        self._reader.take_into(view)
        return view

    def _inflate(self, compression: Compression, data: bytes | memoryview, size: int) -> bytes:
        if self._decompressor is None:
            self._decompressor = decompressor(compression)
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
    """

    def __init__(self, channels: Channels, page_bits: int) -> None:
        self._given = channels
        self._format = PacketFormat(page_bits)
        self._channels: dict[str, _Channel] = {}
        self._epochs = 0

    def surveys(self) -> tuple[ChannelSurvey, ...]:
        """The channels so far."""
        return tuple(channel.survey() for channel in sorted(self._channels.values(), key=lambda c: c.id))

    def read_epoch(self, ram: RamSurveyor, offset: int) -> None:
        """Read each channel up to its next SYNC.

        :param offset: offset in the main stream where the epoch begins
        :raise StreamError: When a channel is broken.
        """
        self._epochs += 1
        for given in self._given():
            if given.label not in self._channels:
                channel = self._channels[given.label] = _Channel(given, self._format)
                channel.open()
                if sum(other.id == channel.id for other in self._channels.values()) > 1:
                    raise StreamError(
                        f"there is a channel with the number {channel.id} already", given.label, 0
                    )
        if not self._channels:
            return
        ram.begin_epoch(offset)
        for channel in self._channels.values():
            channel.read_until(self._epochs, ram)

    def read_end(self) -> None:
        """Read what is left of the channels when all of guest RAM has come.

        :raise StreamError: When it is anything that matters, or when a channel has been left out.
        """
        numbers = {channel.id for channel in self._channels.values()}
        for number in range(len(numbers)):
            if number not in numbers:
                raise StreamError(
                    f"channel {number} is missing; there is one with the number {max(numbers)}", "multifd"
                )
        for channel in self._channels.values():
            channel.read_rest()
