from collections.abc import Iterator

import numpy as np
import pytest

from sterna.memory.ram import RamBlock


@pytest.fixture
def block() -> Iterator[RamBlock]:
    """A RAM block of eight pages: random, zero, and zero but for the last byte."""
    with RamBlock("toy.ram", 8 * 4096) as ram:
        ram.data[:] = np.random.default_rng(3).integers(0, 256, ram.size, dtype=np.uint8)
        ram.data[2 * 4096 : 5 * 4096] = 0
        ram.data[4 * 4096 - 1] = 1
        yield ram
