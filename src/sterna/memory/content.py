"""Loops over the content of pages, for compiled code."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import kernel
from sterna.memory.bitmap import Words

Bytes = NDArray[np.uint8]
Items = TypeVar("Items", NDArray[np.uint8], NDArray[np.uint64])


def _is_zero_twin(words: Words, first: int, count: int) -> bool:
    return not words[first : first + count].any()


@kernel(twin=_is_zero_twin, ahead=False, inline=True)
def is_zero(words: Words, first: int, count: int) -> bool:
    """Whether all of `count` words from `first` on are zero.

    :param count: a multiple of 8
    """
    # Eight words at a time become vector code.
    for group in range(first, first + count, 8):
        seen = words[group]
        for j in range(1, 8):
            seen |= words[group + j]
        if seen != np.uint64(0):
            return False
    return True


def _clear_twin(words: Words, first: int, count: int) -> None:
    words[first : first + count] = 0


@kernel(twin=_clear_twin, ahead=False, inline=True)
def clear(words: Words, first: int, count: int) -> None:
    """Make `count` words from `first` on zero."""
    for i in range(first, first + count):
        words[i] = 0


def _copy_twin(target: Items, data: Items) -> None:
    target[:] = data


@kernel(twin=_copy_twin, ahead=False)
def copy(target: Items, data: Items) -> None:
    """Copy items; both arrays have the same size."""
    # A loop that starts at zero becomes vector code; numba's own copy of slices is five times slower.
    for i in range(target.size):
        target[i] = data[i]
