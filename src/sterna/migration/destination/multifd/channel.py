"""One multifd channel of a destination: a connection, and a thread that puts its pages into guest RAM.

Pages that are not compressed are read from the socket to where they belong. Before a byte is read, every page number
has been compared with the size of its block.
"""

import threading
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sterna.host.printable import describe
from sterna.jit.kernel import COMPILED
from sterna.memory.bitmap import Words, new_bitmap, set_bits
from sterna.memory.digest import PIECE_SHIFT
from sterna.memory.ram import RamBlock
from sterna.memory.rollingdigest import Marks
from sterna.memory.vectors import Vectors, vectors_of
from sterna.migration.channels.channel import Channel
from sterna.migration.destination.multifd.receiveloop import RECEIVE_STATE, take_packets
from sterna.migration.errors import ChannelError, MigrationError
from sterna.stream.multifd import kernels
from sterna.stream.multifd.compression import Decompressor
from sterna.stream.multifd.format import COMPRESSED_LIMIT, Compression, Packet, PacketFormat
from sterna.stream.wire import StreamError


class SyncBarrier(Protocol):
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
        barrier: SyncBarrier,
    ) -> None:
        self.index = index
        self.channel = channel
        channel.peer = f"multifd channel {index} from {channel.peer}"
        self._blocks = blocks
        self._page_bits = page_bits
        self._written = written
        self._barrier = barrier
        self._format = PacketFormat(page_bits)
        self._header = np.zeros(self._format.header_bytes, dtype=np.uint8)
        self._header_bytes = 0
        self._block: RamBlock | None = None
        self._block_name = np.zeros(0, dtype=np.uint8)
        self._compression: Compression | None = None
        self._coded: bytearray = bytearray()
        self._decompressor: Decompressor | None = None
        self.received: dict[str, Words] = {
            name: new_bitmap(block.size >> page_bits) for name, block in blocks.items()
        }
        self._numbers = np.zeros(self._format.pages, dtype=np.int64)
        # The pages of a packet and the header after it, in one gather list.
        self._vectors: Vectors = np.empty((self._format.pages + 1, 2), dtype=np.uint64)
        self._next_header = vectors_of(self._header.data)[0]
        self._receive_state = np.zeros(1, dtype=RECEIVE_STATE)
        self._receive_state["page_bits"], self._receive_state["header"] = page_bits, self._next_header[0]
        self._thread = threading.Thread(target=self._run, name=f"multifd-receive-{index}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread, whose channel has been shut down."""
        self._thread.join()

    def take(self) -> tuple[int, int]:
        """Bytes and pages since the last call. Only while the thread waits for the main channel."""
        state = self._receive_state[0]
        size, pages = int(state["taken_bytes"]), int(state["taken_pages"])
        state["taken_bytes"] = state["taken_pages"] = 0
        return size, pages

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
        self._barrier.leave(self, error)

    def _read_packet(self) -> bool:
        """
        :return: whether another may follow
        """
        if COMPILED and self._block is not None and self._decompressor is None:
            self._take_packets(self._block)
        if not self._read_header():
            return False
        packet = self._format.decode(self._header.data)
        self._header_bytes = 0
        if packet.pages.size:
            self._read_pages(packet)
        self._count(packet)
        return self._barrier.arrive(self) if packet.sync else True

    def _take_packets(self, block: RamBlock) -> None:
        """Read packets for the block that the last was for, as far as they need nothing else. Without a compiler all of them are
        left to `_read_pages`.
        """
        state = self._receive_state[0]
        state["fd"], state["cancel_fd"] = self.channel.descriptors()
        state["have"] = self._header_bytes
        state["block"], state["limit"] = block.hva, block.size >> self._page_bits
        have, row, end, within = take_packets(
            self._receive_state,
            self._header,
            self._block_name,
            self._numbers,
            self._vectors,
            self._written[block.name],
            self.received[block.name],
        )
        if not within:
            self._header_bytes = have
            return
        packet = self._format.decode(self._header.data)
        self._header_bytes = self._fill(self._vectors[:end], row, have)
        self._note(block, packet)
        self._count(packet)

    def _read_header(self) -> bool:
        """Read the rest of a header.

        :return: False when the connection has ended instead of another packet
        """
        view = self._header.data
        while self._header_bytes < len(view):
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
        if block is not self._block:
            self._block = block
            self._block_name = np.array(bytearray(block.name.encode() + b"\0"), dtype=np.uint8)
        if self._decompressor is None:
            rows = kernels.gather_pages(
                packet.pages, block.hva, self._page_bits, self._vectors[:0], self._vectors, 0
            )
            if not packet.sync:
                self._vectors[rows] = self._next_header
                rows += 1
            self._header_bytes = self._fill(self._vectors[:rows], 0, packet.data_bytes)
        else:
            data = memoryview(self._coded)[: packet.data_bytes]
            self._fill(vectors_of(data), 0, packet.data_bytes)
            pages = self._decompressor.decompress(data, packet.pages.size << self._page_bits)
            kernels.place(np.frombuffer(pages, dtype=np.uint8), packet.pages, self._page_bits, block.data)
        self._note(block, packet)

    def _note(self, block: RamBlock, packet: Packet) -> None:
        """The pages of a packet have been written."""
        # A byte each, so that channels do not undo each other's marks.
        self._written[block.name][packet.pages >> (PIECE_SHIFT - self._page_bits)] = 1
        set_bits(self.received[block.name], packet.pages.astype(np.uint64))

    def _count(self, packet: Packet) -> None:
        self._receive_state["taken_bytes"] += self._format.header_bytes + packet.data_bytes
        self._receive_state["taken_pages"] += packet.pages.size

    def _check_compression(self, compression: Compression) -> None:
        if self._compression is None:
            self._compression = compression
            if compression is not Compression.NONE:
                self._decompressor = Decompressor(compression)
                self._coded = bytearray(COMPRESSED_LIMIT)
        elif compression is not self._compression:
            raise StreamError(
                f"a packet with compression {compression.value} after others with {self._compression.value}"
            )

    def _fill(self, vectors: Vectors, row: int, size: int) -> int:
        """Read until `size` bytes are where `vectors` points from `row` on.

        :return: how many more were read
        """
        done, _ = self.channel.read_vectors(vectors, row, size)
        if done < size:
            raise ChannelError(f"{self.channel.peer} ended within a packet")
        return done - size
