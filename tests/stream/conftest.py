import os
import shutil
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


@pytest.fixture(scope="session")
def qemu() -> str:
    """Path of qemu-system-arm."""
    found = shutil.which("qemu-system-arm")
    if found is None and os.environ.get("STERNA_REQUIRE_QEMU") == "1":
        pytest.fail("qemu-system-arm is missing, and STERNA_REQUIRE_QEMU=1")
    if found is None:
        pytest.skip("qemu-system-arm is not installed")
    return found
