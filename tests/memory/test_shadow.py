"""The second copy of RAM, compiled and not."""

from collections.abc import Iterator

import numpy as np
import pytest
from tests.jit.plain import plain

from sterna.memory import shadow as module
from sterna.memory.address import PAGE_SIZE
from sterna.memory.bitmap import full_bitmap, new_bitmap, page_numbers, set_bits
from sterna.memory.populated import populated
from sterna.memory.ram import RamBlock
from sterna.memory.shadow import Shadow

PAGES = 70 * 64 + 5
"""Enough for two threads, and not a multiple of 64."""


@pytest.fixture(params=["compiled", "plain"])
def ram(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RamBlock]:
    if request.param == "plain":
        for name in ("_copy", "_compare"):
            monkeypatch.setattr(module, name, plain(getattr(module, name)))
    with RamBlock("ram", PAGES * PAGE_SIZE, huge_pages=False) as block:
        yield block


def everything() -> np.ndarray:  # type: ignore[type-arg]
    return np.arange(PAGES, dtype=np.int64)


@pytest.mark.parametrize("byte", [0, 7, 8, 2049, 4095])
def test_any_byte_that_differs_is_found(ram: RamBlock, byte: int) -> None:
    ram.data[:] = np.random.default_rng(1).integers(0, 256, ram.size, dtype=np.uint8)
    shadow = Shadow([ram])
    shadow.keep("ram", everything())
    judged = shadow.judged("ram", new_bitmap(PAGES))
    assert page_numbers(judged).size == PAGES
    assert not shadow.differing("ram", judged).size
    changed = [0, 63, 64, 2240, 2241, PAGES - 1]
    for page in changed:
        ram.data[page * PAGE_SIZE + byte] ^= 0x80
    assert shadow.differing("ram", judged).tolist() == changed
    assert shadow.difference("ram", 64) == (byte, byte)
    excused = new_bitmap(PAGES)
    set_bits(excused, np.array([64, PAGES - 1], dtype=np.uint64))
    assert shadow.differing("ram", shadow.judged("ram", excused)).tolist() == [0, 63, 2240, 2241]
    shadow.keep("ram", np.array([0, 2241], dtype=np.int64))
    assert shadow.differing("ram", judged).tolist() == [63, 64, 2240, PAGES - 1]
    shadow.close()


def test_a_page_becomes_zero_again(ram: RamBlock) -> None:
    shadow = Shadow([ram])
    ram.data[5 * PAGE_SIZE] = 1
    shadow.keep("ram", np.array([5], dtype=np.int64))
    ram.data[5 * PAGE_SIZE] = 0
    assert shadow.differing("ram", shadow.judged("ram", new_bitmap(PAGES))).tolist() == [5]
    shadow.keep("ram", np.array([5], dtype=np.int64))
    assert not shadow.differing("ram", full_bitmap(PAGES)).size
    shadow.close()


def test_zeros_cost_no_memory(ram: RamBlock) -> None:
    shadow = Shadow([ram])
    ram.data[600 * PAGE_SIZE] = 1
    shadow.keep("ram", np.arange(512, 1024, dtype=np.int64))
    copy = shadow.block("ram")
    there = populated(copy, 0, copy.pages, 512)
    assert there.tolist() == [number == 1 for number in range(there.size)]
    # Memory that was never touched is neither judged nor read.
    judged = page_numbers(shadow.judged("ram", new_bitmap(PAGES))).tolist()
    assert judged == list(range(512, 1024))
    assert not populated(ram, 1024, ram.pages, PAGES).any()
    shadow.close()
