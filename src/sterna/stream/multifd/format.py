"""The multifd channels of QEMU 7.2: packets of pages beside the main stream.

Each channel begins with an initial packet (UUID of the machine, number of the channel; in bytes that QEMU does not use a
sterna puts what tells its channels from others'); then packets follow to the end. A packet is a header of fixed size for its
page size, and the data of up to 512 KiB of pages of one RAM block: the pages as they are, or a piece of the channel's one
compressed stream (`sterna.stream.multifd.compression`).

The main stream still carries everything else, pages that are all zero included. Where it has EOS in a ram section, its
first part included, each channel has one packet with SYNC: pages before it are in place before anything after the
EOS is read. QEMU may put pages and SYNC into one packet, and sends packets with neither; fields that belong to pages
keep old values in a packet without any. Packet numbers may repeat.

Source: streams that QEMU 7.2 wrote, and the structures in its ``migration/multifd.c``. All integers are big-endian.
"""

import struct
from dataclasses import dataclass, field
from enum import Enum, IntFlag

import numpy as np
from numpy.typing import NDArray

from sterna.stream.wire import NAME_LIMIT, StreamError

Bytes = bytes | bytearray | memoryview

MAGIC = 0x11223344
"""The first four bytes of the initial packet and of each header."""
VERSION = 1
NO_UUID = bytes(16)
"""Of a machine that has none."""
NO_TOKEN = bytes(16)
"""Of a channel whose source has given it none: a QEMU's."""
CHANNEL_LIMIT = 255
"""Most channels of a migration: the highest value of `multifd-channels`."""
GROUP_BYTES = 512 << 10
"""Most bytes of pages in one packet."""
COMPRESSED_LIMIT = 2 * GROUP_BYTES
"""Most bytes that a packet's compressed pages may take; QEMU's own buffer has this size."""

_INIT = struct.Struct(">II16sB7x16s16x")
INIT_BYTES = _INIT.size
_HEAD = struct.Struct(">6IQ32x256s")
HEAD_BYTES = _HEAD.size
"""Bytes of a header before the offsets of its pages, which are 64-bit integers."""
COUNT_AT, SIZE_AT, NUMBER_AT, NAME_AT = 16, 20, 24, 64
"""Where a header has the number of pages, the bytes of data, the packet's number, and the block's name."""
_OFFSET_BYTES = 8


class PacketFlag(IntFlag):
    """The lowest bit of a header's flags; `Compression` is above it."""

    SYNC = 1


_COMPRESSION_SHIFT = 1
_KNOWN_FLAGS = PacketFlag.SYNC | 7 << _COMPRESSION_SHIFT


class Compression(Enum):
    """How the pages of a packet are coded. The names are those of the parameter `multifd-compression`."""

    NONE = "none"
    ZLIB = "zlib"
    ZSTD = "zstd"

    @property
    def flags(self) -> int:
        """The bits of a header's flags."""
        return _CODES.index(self) << _COMPRESSION_SHIFT


_CODES = tuple(Compression)


@dataclass(frozen=True)
class Init:
    """The initial packet.

    :ivar uuid: of the machine, 16 bytes, all zero when it has none
    :ivar id: number of the channel, from 0
    :ivar token: 16 bytes that only this migration's channels have; QEMU looks at none
    """

    uuid: bytes
    id: int
    token: bytes = NO_TOKEN

    def encode(self) -> bytes:
        """The packet on the wire, `INIT_BYTES` of them."""
        return _INIT.pack(MAGIC, VERSION, self.uuid, self.id, self.token)


def decode_init(data: Bytes) -> Init:
    """
    :raise StreamError: When it is not an initial packet of this version.
    """
    if len(data) != INIT_BYTES:
        raise StreamError(f"an initial multifd packet of {len(data)} bytes instead of {INIT_BYTES}")
    magic, version, uuid, channel, token = _INIT.unpack(data)
    _check_opening(magic, version)
    return Init(uuid, channel, token)


@dataclass(frozen=True)
class Packet:
    """A packet's header.

    :ivar sync: the packet, its pages before it, meets an EOS of the main stream
    :ivar compression: of the pages; NONE in a packet without pages
    :ivar block: name of the RAM block, empty without pages
    :ivar pages: numbers of the stream's pages within the block, `shape (n,)`, dtype int64
    :ivar data_bytes: bytes of page data that follow the header
    :ivar number: of the packet, counted over all channels
    """

    sync: bool = False
    compression: Compression = Compression.NONE
    block: str = ""
    pages: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    data_bytes: int = 0
    number: int = 0


class PacketFormat:
    """Headers for one page size.

    :param page_bits: log2 of the stream's page size

    :ivar page_bits: as given
    :ivar pages: most pages in one packet
    :ivar header_bytes: bytes of each header
    """

    def __init__(self, page_bits: int) -> None:
        self.page_bits = page_bits
        self.pages = GROUP_BYTES >> page_bits
        self.header_bytes = _HEAD.size + _OFFSET_BYTES * self.pages

    def encode(self, packet: Packet) -> bytes:
        """The header on the wire.

        :raise StreamError: When there are too many pages, or the name is too long.
        """
        count = packet.pages.size
        name = packet.block.encode()
        if count > self.pages:
            raise StreamError(f"{count} pages in one multifd packet; there is room for {self.pages}")
        if len(name) > NAME_LIMIT:
            raise StreamError(f"RAM block {packet.block!r}: a name has at most {NAME_LIMIT} bytes")
        flags = packet.compression.flags if count else 0
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            flags | (PacketFlag.SYNC if packet.sync else 0),
            self.pages,
            count,
            packet.data_bytes,
            packet.number,
            name,
        )
        offsets = (packet.pages << self.page_bits).astype(">u8").tobytes()
        return (head + offsets).ljust(self.header_bytes, b"\0")

    def decode(self, data: Bytes) -> Packet:
        """Check a header for everything that can be told without the RAM blocks: whoever has those still has to compare the
        pages with the block's size.

        :param data: `header_bytes` bytes
        :raise StreamError: When it is not a header, or describes more than a packet can have.
        """
        magic, version, flags, room, count, size, number, raw = _HEAD.unpack_from(data)
        _check_opening(magic, version)
        if flags & ~_KNOWN_FLAGS:
            raise StreamError(f"a multifd packet with unknown flags {flags:#x}")
        if room > self.pages:
            raise StreamError(
                f"a multifd packet with room for {room} pages; {self.pages} of {1 << self.page_bits} bytes are the most"
            )
        if count > room:
            raise StreamError(f"a multifd packet of {count} pages with room for {room}")
        sync = bool(flags & PacketFlag.SYNC)
        if count == 0:
            # QEMU leaves the other fields as the packet before had them.
            return Packet(sync, number=number)
        code = flags >> _COMPRESSION_SHIFT
        if code >= len(_CODES):
            raise StreamError(f"a multifd packet with the unknown compression {code}")
        compression = _CODES[code]
        whole = count << self.page_bits
        if compression is Compression.NONE and size != whole:
            raise StreamError(
                f"a multifd packet of {count} pages with {size} bytes of data instead of {whole}"
            )
        if not 0 < size <= COMPRESSED_LIMIT:
            raise StreamError(
                f"a multifd packet with {size} bytes of compressed pages; {COMPRESSED_LIMIT} are the most"
            )
        name, end, _ = raw.partition(b"\0")
        if not end or not name:
            raise StreamError("a multifd packet of pages without the name of their RAM block")
        offsets = np.frombuffer(data, dtype=">u8", count=count, offset=_HEAD.size).astype(np.uint64)
        pages = offsets >> np.uint64(self.page_bits)
        misplaced = np.flatnonzero(pages << np.uint64(self.page_bits) != offsets)
        if misplaced.size:
            raise StreamError(
                f"page offset {int(offsets[misplaced[0]]):#x} in a multifd packet is not that of a page"
            )
        # A shift by ten bits and more leaves room for the sign.
        return Packet(
            sync,
            compression,
            name.decode("utf-8", "backslashreplace"),
            pages.astype(np.int64),
            size,
            number,
        )


def _check_opening(magic: int, version: int) -> None:
    if magic != MAGIC:
        raise StreamError(f"no multifd packet: it begins with {magic:#010x}, not {MAGIC:#010x}")
    if version != VERSION:
        raise StreamError(f"version {version} of multifd; only {VERSION} is supported")
