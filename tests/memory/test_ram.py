"""Guest RAM on the host's memory."""

import pytest

from sterna.memory.address import PMD_SIZE
from sterna.memory.digest import populated_chunks
from sterna.memory.ram import RamBlock


@pytest.mark.parametrize("populated", [False, True])
def test_the_host_gives_memory_when_it_is_touched_or_at_once(populated: bool) -> None:
    with RamBlock("ram", 4 * PMD_SIZE, populated=populated) as block:
        assert populated_chunks(block).tolist() == [populated] * 4
        block.data[PMD_SIZE] = 1
        assert populated_chunks(block).tolist() == [populated, True, populated, populated]
        block.discard()
        assert not block.data.any()


def test_a_populated_block_has_its_memory_again_when_it_was_discarded() -> None:
    with RamBlock("ram", 2 * PMD_SIZE, populated=True) as block:
        block.data[:] = 1
        block.discard()
        assert populated_chunks(block).all()
        assert not block.data.any()
