"""Packets of pages that are not compressed, laid out for one system call."""

import numpy as np

from sterna.memory.bitmap import PageNumbers
from sterna.memory.content import Bytes
from sterna.memory.ram import RamBlock
from sterna.memory.vectors import Vectors
from sterna.stream.multifd import kernels
from sterna.stream.multifd.format import HEAD_BYTES, Packet, PacketFormat

IN_THE_BLOCK: Vectors = np.empty((0, 2), dtype=np.uint64)
"""Instead of where pages are."""


def head_of(packet_format: PacketFormat, block: RamBlock) -> Bytes:
    """The header of a packet for a block, up to its pages."""
    packet = Packet(block=block.name, pages=np.zeros(1, dtype=np.int64))
    return np.array(bytearray(packet_format.encode(packet)[:HEAD_BYTES]), dtype=np.uint8)


def packets_of(
    packet_format: PacketFormat,
    head: Bytes,
    block: RamBlock,
    pages: PageNumbers,
    sources: Vectors,
    number: int,
) -> tuple[Vectors, Bytes]:
    """As few packets as the pages fit into.

    :param head: what `head_of` made
    :param pages: numbers in the stream's page size, at least one
    :param sources: where the pages are, one row for each, unless they are `IN_THE_BLOCK`
    :param number: of the first packet
    :return: a gather list of all of them, and the headers that it points into, `shape (packets, header_bytes)`
    """
    count = -(-pages.size // packet_format.pages)
    headers = np.zeros((count, packet_format.header_bytes), dtype=np.uint8)
    vectors: Vectors = np.empty((pages.size + count, 2), dtype=np.uint64)
    rows = kernels.lay_out(
        np.array([(packet_format.page_bits, number, block.hva, headers.ctypes.data)], dtype=kernels.LAYOUT),
        pages,
        sources,
        head,
        headers,
        vectors,
    )
    return vectors[:rows], headers
