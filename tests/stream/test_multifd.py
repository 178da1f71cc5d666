"""Multifd packets: as QEMU 7.2 writes them, round trips, and packets that are none."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.stream.multifd.compression import Decompressor, compressor
from sterna.stream.multifd.format import (
    COMPRESSED_LIMIT,
    INIT_BYTES,
    Compression,
    Init,
    Packet,
    PacketFormat,
    decode_init,
)
from sterna.stream.wire import StreamError

FORMAT = PacketFormat(12)
INIT = bytes.fromhex("11223344 00000001") + bytes(16) + b"\x01" + bytes(39)
# As QEMU 7.2 wrote them; what follows the first offsets is left over from packets before.
HEAD = bytes.fromhex("11223344 00000001 00000000 00000080 00000002 00002000 000000000000000d") + bytes(32)
PAGES = HEAD + b"/rom@etc/acpi/tables".ljust(256, b"\0") + struct.pack(">3Q", 0, 0x1000, 0xA7E000)
SYNC = bytes.fromhex("11223344 00000001 00000001 00000080 00000000 00002000 0000000000000011") + PAGES[32:]


def qemu(head: bytes) -> bytes:
    return head.ljust(FORMAT.header_bytes, b"\x5a")


def changed(head: bytes, at: int, value: int, size: int = 4) -> bytes:
    return qemu(head[:at] + value.to_bytes(size, "big") + head[at + size :])


def fields(packet: Packet) -> tuple[object, ...]:
    return (
        packet.sync,
        packet.compression,
        packet.block,
        packet.pages.tolist(),
        packet.data_bytes,
        packet.number,
    )


def test_sizes_are_those_on_the_wire() -> None:
    assert INIT_BYTES == 64
    assert (FORMAT.pages, FORMAT.header_bytes) == (128, 1344)
    legacy = PacketFormat(10)
    assert (legacy.pages, legacy.header_bytes) == (512, 4416)


def test_initial_packet_of_qemu() -> None:
    assert decode_init(INIT) == Init(bytes(16), 1)
    assert decode_init(INIT).encode() == INIT


def test_headers_of_qemu() -> None:
    packet = FORMAT.decode(qemu(PAGES))
    assert fields(packet) == (False, Compression.NONE, "/rom@etc/acpi/tables", [0, 1], 8192, 13)
    assert FORMAT.encode(packet) == PAGES[:-8].ljust(1344, b"\0")
    assert fields(FORMAT.decode(qemu(SYNC))) == (True, Compression.NONE, "", [], 0, 17), (
        "leftovers mean nothing"
    )
    both = FORMAT.decode(changed(PAGES, 8, 3))
    assert (both.sync, both.compression) == (True, Compression.ZLIB)
    neither = FORMAT.decode(changed(SYNC, 8, 0))
    assert (neither.sync, neither.pages.size) == (False, 0)


@given(
    st.sampled_from([10, 11, 12]),
    st.booleans(),
    st.sampled_from(Compression),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60),
    st.lists(st.integers(0, 2**51), min_size=1, max_size=512),
    st.integers(1, COMPRESSED_LIMIT),
    st.integers(0, 2**64 - 1),
)
def test_a_header_comes_back(
    bits: int, sync: bool, compression: Compression, block: str, pages: list[int], size: int, number: int
) -> None:
    format = PacketFormat(bits)
    pages = pages[: format.pages]
    size = len(pages) << bits if compression is Compression.NONE else size
    packet = Packet(sync, compression, block, np.array(pages, dtype=np.int64), size, number)
    data = format.encode(packet)
    assert len(data) == format.header_bytes
    assert fields(format.decode(data)) == fields(packet)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (changed(PAGES, 0, 0x11223345), "begins with 0x11223345"),
        (changed(PAGES, 4, 2), "version 2"),
        (changed(PAGES, 8, 0x10), "unknown flags 0x10"),
        (changed(PAGES, 8, 6), "unknown compression 3"),
        (changed(PAGES, 12, 129), "room for 129 pages"),
        (changed(PAGES, 12, 1), "2 pages with room for 1"),
        (changed(PAGES, 16, 129), "129 pages with room for 128"),
        (changed(PAGES, 16, 0xFFFFFFFF), "4294967295 pages with room for 128"),
        (changed(PAGES, 20, 8191), "8191 bytes of data instead of 8192"),
        (changed(changed(PAGES, 8, 2), 20, 0xFFFFFFFF), "4294967295 bytes of compressed pages"),
        (changed(changed(PAGES, 8, 2), 20, 0), "0 bytes of compressed pages"),
        (changed(PAGES, 64, 0, 1), "without the name"),
        (qemu(PAGES[:64] + b"a" * 256 + PAGES[320:]), "without the name"),
        (changed(PAGES, 328, 0x1001, 8), "0x1001 in a multifd packet"),
        (changed(PAGES, 328, 2**64 - 1, 8), "0xffffffffffffffff in a multifd packet"),
    ],
)
def test_what_no_packet_has_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(StreamError, match=complaint):
        FORMAT.decode(data)


def test_an_initial_packet_that_is_none_is_refused() -> None:
    with pytest.raises(StreamError, match="begins with 0x5145564d"):
        decode_init(b"QEVM" + INIT[4:])
    with pytest.raises(StreamError, match="version 7"):
        decode_init(INIT[:7] + b"\7" + INIT[8:])


def test_more_than_a_packet_holds_is_not_encoded() -> None:
    with pytest.raises(StreamError, match="129 pages"):
        FORMAT.encode(Packet(block="a", pages=np.arange(129), data_bytes=129 << 12))
    with pytest.raises(StreamError, match="at most 255 bytes"):
        FORMAT.encode(Packet(block="a" * 256, pages=np.arange(1), data_bytes=4096))


@pytest.mark.slow
@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), max_size=12))
def test_damaged_headers_decode_within_bounds_or_not_at_all(damage: list[tuple[int, int]]) -> None:
    data = bytearray(qemu(PAGES))
    for at, value in damage:
        data[at] = value
    try:
        packet = FORMAT.decode(bytes(data))
    except StreamError:
        return
    assert packet.pages.size <= 128
    assert packet.data_bytes <= COMPRESSED_LIMIT
    assert (packet.pages >= 0).all()
    assert (packet.pages.size == 0) == (packet.block == "")


CODERS = [
    (Compression.ZLIB, 0),
    (Compression.ZLIB, 1),
    (Compression.ZLIB, 9),
    (Compression.ZSTD, 1),
    (Compression.ZSTD, 20),
]


@pytest.mark.parametrize(("compression", "level"), CODERS)
def test_a_channels_pieces_come_back_one_by_one(compression: Compression, level: int) -> None:
    rng = np.random.default_rng(1)
    here, there = compressor(compression, level), Decompressor(compression)
    for size in (4096, 512 << 10, 1, 8192):
        for data in (bytes(size), rng.bytes(size), b"abc" * (size // 3) + bytes(size % 3)):
            piece = here(data)
            assert len(piece) <= COMPRESSED_LIMIT
            assert there.decompress(piece, size) == data


@pytest.mark.parametrize("compression", [Compression.ZLIB, Compression.ZSTD])
def test_pieces_that_do_not_hold_the_packets_pages_are_refused(compression: Compression) -> None:
    bomb = compressor(compression, 9)(bytes(64 << 20))
    with pytest.raises(StreamError, match="more than the 4096 bytes"):
        Decompressor(compression).decompress(bomb, 4096)
    short = compressor(compression, 1)(b"a" * 4095)
    with pytest.raises(StreamError, match="4095 bytes instead of 4096"):
        Decompressor(compression).decompress(short, 4096)
    with pytest.raises(StreamError, match=f"damaged {compression.value} data"):
        Decompressor(compression).decompress(b"\xff" * 100, 4096)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([Compression.ZLIB, Compression.ZSTD]),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 200),
)
def test_damaged_pieces_give_as_many_bytes_as_asked_or_none(
    compression: Compression, damage: list[tuple[int, int]], cut: int
) -> None:
    piece = bytearray(compressor(compression, 1)(np.random.default_rng(3).bytes(300) + bytes(8000)))
    for at, value in damage:
        piece[at % len(piece)] = value
    try:
        assert len(Decompressor(compression).decompress(bytes(piece[: len(piece) - cut]), 8300)) == 8300
    except StreamError:
        pass


def test_a_compressed_stream_that_ends_is_refused() -> None:
    import zlib

    with pytest.raises(StreamError, match="ends within"):
        Decompressor(Compression.ZLIB).decompress(zlib.compress(bytes(4096)), 4096)
