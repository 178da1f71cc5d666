"""A compiled loop that reads packets from a connection to where their pages belong, and its plain twin."""

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import kernel
from sterna.memory.bitmap import Words
from sterna.memory.vectors import Vectors
from sterna.migration.channels.gather import read_list
from sterna.stream.multifd.kernels import Bytes, Marks, Numbers, gather_pages, mark, plain_pages


def _take_packets_twin(
    fd: int,
    cancel_fd: int,
    header: Bytes,
    have: int,
    name: Bytes,
    page_bits: int,
    limit: int,
    addresses: NDArray[np.uint64],
    pages: Numbers,
    vectors: Vectors,
    written: Marks,
    piece_shift: int,
    received: Words,
    taken: NDArray[np.int64],
) -> tuple[int, int, int, int]:
    # All of them are left to Python.
    return have, 0, 0, 0


@kernel(twin=_take_packets_twin)
def take_packets(
    fd: int,
    cancel_fd: int,
    header: Bytes,
    have: int,
    name: Bytes,
    page_bits: int,
    limit: int,
    addresses: NDArray[np.uint64],
    pages: Numbers,
    vectors: Vectors,
    written: Marks,
    piece_shift: int,
    received: Words,
    taken: NDArray[np.int64],
) -> tuple[int, int, int, int]:
    """Read packets as `plain_pages` knows them to where their pages belong, until there is another one, or a reason not to read
    on: the stream's end, an error, a cancellation. Whoever called finds that on reading further.

    :param header: where headers are read to, with `have` bytes of one in it already
    :param addresses: of the block's first byte, and of `header`
    :param pages: room for a packet's page numbers
    :param vectors: room for the gather list of a packet and a header
    :param written: the block's; marked after a page was written
    :param piece_shift: log2 of pages for each mark
    :param received: a bit for each page of the block
    :param taken: bytes and pages of whole packets are added to its two numbers
    :return: bytes of a header that was not taken; or, within the data of the packet whose header is there, bytes of it that
        are missing, and the rows of `vectors` that tell where they belong, from and to: the header after it is the last
    """
    while True:
        if have < header.size:
            vectors[0, 0] = addresses[1] + np.uint64(have)
            vectors[0, 1] = header.size - have
            got, _, _ = read_list(fd, cancel_fd, vectors[:1], 0, header.size - have)
            have += got
            if have < header.size:
                return have, 0, 0, 0
        count = plain_pages(header, name, page_bits, limit, pages)
        if count == 0:
            return have, 0, 0, 0
        some = pages[:count]
        end = gather_pages(some, addresses[0], page_bits, vectors[:0], vectors, 0)
        vectors[end, 0] = addresses[1]
        vectors[end, 1] = header.size
        end += 1
        size = count << page_bits
        got, row, _ = read_list(fd, cancel_fd, vectors[:end], 0, size)
        if got < size:
            return size - got, row, end, 1
        for i in range(count):
            written[pages[i] >> piece_shift] = 1
        mark(received, some)
        taken[0] += header.size + size
        taken[1] += count
        have = got - size
