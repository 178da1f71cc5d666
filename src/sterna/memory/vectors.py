"""Gather lists: pieces of memory for a vectored system call."""

from typing import Annotated, TypeAlias

import numpy as np
from numpy.typing import NDArray

Vectors: TypeAlias = Annotated[NDArray[np.uint64], 2]
"""A gather list: `shape (n, 2)`, dtype uint64, C order; rows are (address, length in bytes), as struct iovec.
"""


def vectors_of(data: bytes | bytearray | memoryview) -> Vectors:
    """A gather list of one piece, good as long as `data` is kept."""
    array = np.frombuffer(data, dtype=np.uint8)
    return np.array([[array.ctypes.data, array.size]], dtype=np.uint64)
