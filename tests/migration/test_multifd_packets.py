"""Packets as compiled code lays them out and takes them in, against the format's own words for them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.jit.plain import plain
from tests.stream import reference

from sterna.jit.ahead import fetch_kernels
from sterna.jit.kernel import COMPILED
from sterna.memory.address import PAGE_SIZE
from sterna.memory.ram import RamBlock
from sterna.memory.vectors import vectors_of
from sterna.stream.multifd import kernels
from sterna.stream.multifd.format import Compression, Packet, PacketFormat
from sterna.stream.multifd.packets import IN_THE_BLOCK, head_of, packets_of
from sterna.stream.ram.records import bytes_at
from sterna.stream.wire import StreamError

PAGES = 300
NAME = np.frombuffer(b"ram\0", dtype=np.uint8).copy()


def wire(vectors) -> bytes:
    return b"".join(bytes_at(address, size) for address, size in vectors.tolist())


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("apart", [False, True])
def test_packets_are_those_of_the_format(bits: int, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(bits)
    packet_format = PacketFormat(bits)
    with RamBlock("ram", PAGES * PAGE_SIZE) as block:
        block.data[:] = rng.integers(0, 256, block.size, dtype=np.uint8)
        pages = np.flatnonzero(rng.integers(0, 3, block.size >> bits)).astype(np.int64)
        content = [block.data[page << bits : (page + 1) << bits].tobytes() for page in pages.tolist()]
        sources = IN_THE_BLOCK
        if apart:
            copies = [bytearray(page) for page in content]
            sources = np.concatenate([vectors_of(copy) for copy in copies])
            block.data[:] = 0
        expected = b""
        for number, first in enumerate(range(0, pages.size, packet_format.pages)):
            some = pages[first : first + packet_format.pages]
            packet = Packet(block="ram", pages=some, data_bytes=some.size << bits, number=7 + number)
            expected += packet_format.encode(packet) + b"".join(content[first : first + packet_format.pages])
        assert expected.count(b"ram\0") > 1
        for lay_out in (kernels.lay_out, plain(kernels.lay_out), reference.lay_out):
            monkeypatch.setattr(kernels, "lay_out", lay_out)
            vectors, headers = packets_of(
                packet_format, head_of(packet_format, block), block, pages, sources, 7
            )
            assert headers.shape[1] == packet_format.header_bytes
            assert wire(vectors) == expected


headers = st.builds(
    lambda pages, damage: (pages, damage),
    st.lists(st.integers(0, PAGES + 3), min_size=0, max_size=20),
    st.lists(st.tuples(st.integers(0, 360), st.integers(0, 255)), max_size=2),
)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba the format decodes all packets")
@settings(max_examples=300)
@given(headers, st.sampled_from([10, 12]), st.booleans(), st.sampled_from(["ram", "rom", "ra", "ram2"]))
def test_a_plain_packet_is_what_the_format_decodes(
    header: tuple[list[int], list[tuple[int, int]]], bits: int, sync: bool, name: str
) -> None:
    """Compiled code takes a packet only if the format does, and it has the same pages, all within the block."""
    numbers, damage = header
    packet_format = PacketFormat(bits)
    pages = np.array(numbers, dtype=np.int64)
    packet = Packet(sync=sync, block=name, pages=pages, data_bytes=pages.size << bits, number=3)
    data = np.array(bytearray(packet_format.encode(packet)), dtype=np.uint8)
    for at, value in damage:
        data[at] = value
    try:
        decoded = packet_format.decode(data.tobytes())
    except StreamError:
        expected: list[int] = []
    else:
        ours = decoded.block == "ram" and decoded.compression is Compression.NONE and not decoded.sync
        expected = decoded.pages.tolist() if ours else []
        if any(page >= PAGES for page in expected):
            expected = []
    found = np.full(packet_format.pages, -1, dtype=np.int64)
    count = kernels.plain_pages(data, NAME, bits, PAGES, found)
    assert found[:count].tolist() == expected


def test_a_channel_of_this_process_works() -> None:
    fetch_kernels()
