"""Guest RAM as the destination of a stream ends up with it, for its digests.

Pages that are zero cost nothing. What a stream says of its RAM costs nothing to say either, so the pages that are
held are counted, and there is a limit to them.
"""

import numpy as np
import xxhash
from numpy.typing import NDArray

from sterna.host.limits import available_bytes
from sterna.memory.bitmap import Words, new_bitmap, page_numbers
from sterna.memory.ram import RamBlock

_SHARE = 0.75
"""Of the memory that this process may still take, what may be held."""


def free_bytes() -> int:
    """How much may be held; 0 when the host does not tell what it has."""
    return int((available_bytes() or 0) * _SHARE)


class ImageBlock:
    """One block.

    :raise RamError: When the host cannot map that much.

    :ivar ram: its memory
    :ivar data: its bytes, `shape (size,)`, dtype uint8
    :ivar held: a bit for each of the stream's pages that has been written to
    """

    def __init__(self, name: str, size: int, page_bits: int) -> None:
        self.ram = RamBlock(name, size, huge_pages=False)
        self._page_bits = page_bits
        self.data: NDArray[np.uint8] = self.ram.data
        self.held: Words = new_bitmap(size >> page_bits)

    def page_digests(self) -> NDArray[np.uint64]:
        """XXH3-64 of each page: `shape (pages,)`."""
        size = 1 << self._page_bits
        pages = self.ram.size >> self._page_bits
        digests = np.full(pages, xxhash.xxh3_64_intdigest(bytes(size)), dtype=np.uint64)
        data = self.data.data
        for page in page_numbers(self.held).tolist():
            digests[page] = xxhash.xxh3_64_intdigest(data[page * size : (page + 1) * size])
        return digests
