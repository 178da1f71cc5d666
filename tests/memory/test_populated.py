"""Which memory is there, as the kernel's two ways of telling have it."""

import fcntl
import mmap
import os
from typing import Any

import numpy as np
import pytest

from sterna.memory import populated as populated_module
from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE
from sterna.memory.populated import populated
from sterna.memory.ram import RamBlock

PAGES = 4096


@pytest.fixture(params=["scan", "pagemap"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, where the host has both."""
    name = str(request.param)

    def refuse(*arguments: Any) -> int:
        raise OSError

    if name == "pagemap":
        monkeypatch.setattr(fcntl, "ioctl", refuse)
    else:
        try:
            fd = os.open("/proc/self/pagemap", os.O_RDONLY)
            populated_module._scan(fd, 0, 1, 1, 1)
        except OSError:
            pytest.skip("this kernel has no PAGEMAP_SCAN")
        finally:
            os.close(fd)
        monkeypatch.setattr(populated_module, "_read", refuse)
    return name


def groups_of(touched: list[int], first: int, end: int, group: int) -> list[bool]:
    return [
        any(start <= page < min(start + group, end) for page in touched) for start in range(first, end, group)
    ]


@pytest.mark.parametrize(
    ("first", "end", "group"), [(0, PAGES, 512), (0, PAGES, 16), (3, 4001, 16), (7, 8, 1)]
)
def test_groups_with_memory(way: str, first: int, end: int, group: int) -> None:
    with RamBlock("ram", PAGES << PAGE_SHIFT) as block:
        block.data  # noqa: B018 - mapped, not touched
        assert not populated(block, first, end, group).any()
        pages = [0, 7, 511, 512, 513, 2049, *range(3000, 3040), PAGES - 1]
        for page in pages:
            block.data[page * PAGE_SIZE] = 1
        # Huge pages make neighbours present, so the oracle is the one that was not asked.
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        words = np.frombuffer(os.pread(fd, PAGES * 8, (block.hva >> PAGE_SHIFT) * 8), dtype=np.uint64)
        os.close(fd)
        touched = np.flatnonzero(words >> np.uint64(62)).tolist()
        assert set(pages) <= set(touched)
        assert populated(block, first, end, group).tolist() == groups_of(touched, first, end, group)


def test_every_other_page(way: str) -> None:
    """More ranges than are asked for at once."""
    with RamBlock("ram", 2 * PAGES << PAGE_SHIFT) as block:
        # Only pages of their own lie apart.
        block._mapping.madvise(mmap.MADV_NOHUGEPAGE)
        block.data[:: 2 * PAGE_SIZE] = 1
        assert populated(block, 0, 2 * PAGES, 1).tolist() == [True, False] * PAGES


def test_a_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populated_module, "_PAGEMAP", "/nonexistent")
    with RamBlock("ram", PAGES << PAGE_SHIFT) as block:
        assert populated(block, 0, PAGES, 512).all()


def test_a_scan_that_gets_nowhere_is_not_an_empty_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *arguments: 0)
    with RamBlock("ram", PAGES << PAGE_SHIFT) as block:
        block.data[7 * PAGE_SIZE] = 1
        assert populated(block, 7, 8, 1).tolist() == [True]
