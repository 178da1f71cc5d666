"""Memory beside guest RAM: what is left counts when the guest has touched all of its own."""

from collections.abc import Iterator

import pytest
from tests.hosttree import HostTree, host

from sterna.memory.ram import RamBlock, RamError
from sterna.memory.room import require_room, spare_bytes

__all__ = ["host"]

SIZE = 1 << 20


def leave(host: HostTree, size: int) -> None:
    host.unified("/vm")
    host.group("vm", memory__max=1 << 30, memory__current=(1 << 30) - size)


@pytest.fixture
def ram() -> Iterator[RamBlock]:
    with RamBlock("ram", 4 * SIZE, huge_pages=False) as block:
        block.data[:SIZE] = 1
        yield block


def test_what_the_guest_has_not_touched_is_kept_for_it(host: HostTree, ram: RamBlock) -> None:
    leave(host, 5 * SIZE)
    assert (spare_bytes([ram]), spare_bytes([])) == (2 * SIZE, 5 * SIZE)
    leave(host, 2 * SIZE)
    assert (spare_bytes([ram]), spare_bytes([])) == (0, 2 * SIZE)
    (host.root / "proc/meminfo").unlink()
    host.unified("/other")
    assert spare_bytes([ram]) is None


def test_what_may_take_more_than_is_left_is_refused(host: HostTree, ram: RamBlock) -> None:
    leave(host, 5 * SIZE)
    require_room("it", 2 * SIZE, [ram])
    for size, blocks, text in (
        (
            2 * SIZE + 1,
            [ram],
            "it may take 2.0 MiB of memory, and only 2.0 MiB are left here, beside all of the guest's own",
        ),
        (5 * SIZE + 1, [], "it may take 5.0 MiB of memory, and only 5.0 MiB are left here"),
    ):
        with pytest.raises(RamError) as caught:
            require_room("it", size, blocks)
        assert str(caught.value) == text
    (host.root / "proc/meminfo").unlink()
    host.unified("/other")
    require_room("it", 1 << 60, [ram])
