"""A compiled loop that reads packets from a connection to where their pages belong."""

from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import kernel
from sterna.memory.bitmap import PageNumbers, Words
from sterna.memory.content import Bytes
from sterna.memory.digest import PIECE_SHIFT
from sterna.memory.rollingdigest import Marks
from sterna.memory.vectors import Vectors
from sterna.migration.channels.gather import read_list
from sterna.stream.multifd.kernels import gather_pages, mark, plain_pages

RECEIVE_STATE = np.dtype(
    [
        (name, np.int64)
        for name in (
            "fd",
            "cancel_fd",
            "page_bits",
            # Bytes of a header that have been read.
            "have",
            # The block's pages; addresses of its first byte, and of where headers are read to.
            "limit",
            "block",
            "header",
            # Of whole packets.
            "taken_bytes",
            "taken_pages",
        )
    ]
)
"""What a channel's packets are read with, and how much has been."""

ReceiveState: TypeAlias = Annotated[NDArray[Any], RECEIVE_STATE]
"""`shape (1,)`"""


@kernel()
def take_packets(
    state: ReceiveState,
    header: Bytes,
    name: Bytes,
    pages: PageNumbers,
    vectors: Vectors,
    written: Marks,
    received: Words,
) -> tuple[int, int, int, int]:
    """Read packets as `plain_pages` knows them to where their pages belong, until there is another one, or a reason not to read
    on: the stream's end, an error, a cancellation. Whoever called finds that on reading further.

    :param header: where headers are read to
    :param pages: room for a packet's page numbers
    :param vectors: room for the gather list of a packet and a header
    :param written: the block's; marked after a page was written
    :param received: a bit for each page of the block
    :return: bytes of a header that was not taken; or, within the data of the packet whose header is there, bytes of it that
        are missing, and the rows of `vectors` that tell where they belong, from and to: the header after it is the last
    """
    fd = state[0].fd
    cancel_fd = state[0].cancel_fd
    page_bits = state[0].page_bits
    have = state[0].have
    while True:
        if have < header.size:
            vectors[0, 0] = state[0].header + have
            vectors[0, 1] = header.size - have
            got, _, _ = read_list(fd, cancel_fd, vectors[:1], 0, header.size - have)
            have += got
            if have < header.size:
                return have, 0, 0, 0
        count = plain_pages(header, name, page_bits, state[0].limit, pages)
        if count == 0:
            return have, 0, 0, 0
        some = pages[:count]
        end = gather_pages(some, state[0].block, page_bits, vectors[:0], vectors, 0)
        vectors[end, 0] = state[0].header
        vectors[end, 1] = header.size
        end += 1
        size = count << page_bits
        got, row, _ = read_list(fd, cancel_fd, vectors[:end], 0, size)
        if got < size:
            return size - got, row, end, 1
        for i in range(count):
            written[pages[i] >> (PIECE_SHIFT - page_bits)] = 1
        mark(received, some)
        state[0].taken_bytes += header.size + size
        state[0].taken_pages += count
        have = got - size
