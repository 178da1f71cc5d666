"""One multifd channel of a destination: a connection, and a thread that puts its pages into guest RAM.

Pages that are not compressed are read from the socket to where they belong. Before a byte is read, every page number
has been compared with the size of its block.
"""

import threading
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sterna.memory.bitmap import Words, new_bitmap
from sterna.memory.digest import PIECE_SHIFT
from sterna.memory.ram import RamBlock
from sterna.migration.channels.channel import Channel, Vectors, vectors_of
from sterna.migration.errors import ChannelError, MigrationError, describe
from sterna.migration.multifd import kernels
from sterna.stream.multifd import COMPRESSED_LIMIT, Compression, Packet, PacketFormat
from sterna.stream.pagecompression import Decompressor, decompressor
from sterna.stream.wire import StreamError

Marks = NDArray[np.uint8]
"""A byte for each 64 KiB of a block, 1 since a page there was written."""


class Meeting(Protocol):
    """Where the channels of a migration wait for its main channel."""

    def arrive(self, channel: "ReceiveChannel") -> bool:
        """The channel has read a SYNC: wait for the main channel's EOS.

        :return: whether the channel is to go on
        """
        ...

    def leave(self, channel: "ReceiveChannel", error: Exception | None) -> None:
        """The channel's thread ends, with an error or because the peer has ended the connection."""
        ...


class ReceiveChannel:
    """:param blocks: all of guest RAM, by name
    :param written: as in `RamDecoder`

    :ivar index: number of the channel
    :ivar received: by block name, the stream's pages that have come since `take`; of use while the thread waits
    """

    def __init__(
        self,
        index: int,
        channel: Channel,
        blocks: Mapping[str, RamBlock],
        page_bits: int,
        written: Mapping[str, Marks],
        meeting: Meeting,
    ) -> None:
        self.index = index
        self.channel = channel
        channel.peer = f"multifd channel {index} from {channel.peer}"
        self._blocks = blocks
        self._page_bits = page_bits
        self._written = written
        self._meeting = meeting
        self._format = PacketFormat(page_bits)
        self._header = bytearray(self._format.header_bytes)
        self._coded: bytearray = bytearray()
        self._compression: Compression | None = None
        self._decompressor: Decompressor | None = None
        self._bytes = 0
        self._pages = 0
        self.received: dict[str, Words] = {
            name: new_bitmap(block.size >> page_bits) for name, block in blocks.items()
        }
        # The pages of a packet and the header after it, in one gather list.
        self._vectors: Vectors = np.empty((self._format.pages + 1, 2), dtype=np.uint64)
        self._next_header = vectors_of(self._header)[0]
        self._header_bytes = 0
        self._thread = threading.Thread(target=self._run, name=f"multifd-receive-{index}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread, whose channel has been shut down."""
        self._thread.join()

    def take(self) -> tuple[int, int]:
        """Bytes and pages since the last call. Only while the thread waits for the main channel."""
        taken = self._bytes, self._pages
        self._bytes = self._pages = 0
        return taken

    def _run(self) -> None:
        error: Exception | None = None
        try:
            while self._read_packet():
                pass
        except StreamError as reason:
            error = StreamError(f"{self.channel.peer}: {reason.message}")
        except MigrationError as reason:
            error = reason
        except Exception as reason:
            error = ChannelError(f"{self.channel.peer}: {describe(reason)}")
        self._meeting.leave(self, error)

    def _read_packet(self) -> bool:
        """
        :return: whether another may follow
        """
        if not self._read_header():
            return False
        packet = self._format.decode(self._header)
        self._bytes += self._format.header_bytes + packet.data_bytes
        self._header_bytes = 0
        if packet.pages.size:
            self._read_pages(packet)
        return self._meeting.arrive(self) if packet.sync else True

    def _read_header(self) -> bool:
        """Read the rest of a header.

        :return: False when the connection has ended instead of another packet
        """
        view = memoryview(self._header)
        while self._header_bytes < len(self._header):
            got = self.channel.readinto(view[self._header_bytes :])
            if not got:
                if self._header_bytes:
                    raise ChannelError(f"{self.channel.peer} ended within a packet")
                return False
            self._header_bytes += got
        return True

    def _read_pages(self, packet: Packet) -> None:
        block = self._blocks.get(packet.block)
        if block is None:
            raise StreamError(f"pages of RAM block {packet.block!r}, which does not exist here")
        last = int(packet.pages.max())
        if last >= block.size >> self._page_bits:
            raise StreamError(
                f"page offset {last << self._page_bits:#x} is outside RAM block {block.name!r} of {block.size:#x} bytes"
            )
        self._check_compression(packet.compression)
        if self._decompressor is None:
            rows = kernels.runs(packet.pages, block.hva, self._page_bits, self._vectors)
            if packet.sync:
                self._fill(self._vectors[:rows], packet.data_bytes)
            else:
                self._vectors[rows] = self._next_header
                self._header_bytes = self._fill(self._vectors[: rows + 1], packet.data_bytes)
        else:
            data = memoryview(self._coded)[: packet.data_bytes]
            self._fill(vectors_of(data), packet.data_bytes)
            pages = self._decompressor.decompress(data, packet.pages.size << self._page_bits)
            kernels.place(np.frombuffer(pages, dtype=np.uint8), packet.pages, self._page_bits, block.data)
        # A byte each, so that channels do not undo each other's marks.
        self._written[block.name][packet.pages >> (PIECE_SHIFT - self._page_bits)] = 1
        kernels.mark(self.received[block.name], packet.pages)
        self._pages += packet.pages.size

    def _check_compression(self, compression: Compression) -> None:
        if self._compression is None:
            self._compression = compression
            if compression is not Compression.NONE:
                self._decompressor = decompressor(compression)
                self._coded = bytearray(COMPRESSED_LIMIT)
        elif compression is not self._compression:
            raise StreamError(
                f"a packet with compression {compression.value} after others with {self._compression.value}"
            )

    def _fill(self, vectors: Vectors, size: int) -> int:
        """Read until `size` bytes are where `vectors` points.

        :return: how many more were read
        """
        ends = np.cumsum(vectors[:, 1], dtype=np.int64)
        done = 0
        while True:
            got = self.channel.readinto_vectors(vectors)
            if not got:
                raise ChannelError(f"{self.channel.peer} ended within a packet")
            done += got
            if done >= size:
                return done - size
            row = int(np.searchsorted(ends, done, side="right"))
            rest = int(ends[row]) - done
            vectors[row, 0] += vectors[row, 1] - np.uint64(rest)
            vectors[row, 1] = rest
            vectors = vectors[row:]
            ends = ends[row:]
