"""What is where: looked at by vCPUs while it changes."""

from sterna.hypervisor.interface import MemorySlot
from sterna.hypervisor.memorymap import MemoryMap
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.memory.ram import RamBlock


def test_slots_come_and_go_while_somebody_looks():
    memory = MemoryMap(40)
    with RamBlock("ram", PAGE_SIZE) as block:

        def slot(number):
            return MemorySlot(number, Ipa(number * PAGE_SIZE), PAGE_SIZE, block)

        class Meanwhile(int):
            """An address; when the first slot has been compared with it, another thread changes the slots."""

            def __ge__(self, other):
                if 3 not in memory.slots:
                    memory.put(slot(3))
                    memory.drop(1)
                return super().__ge__(other)

        memory.put(slot(1))
        memory.put(slot(2))
        assert memory.slot_at(Meanwhile(2 * PAGE_SIZE), 4) == slot(2)
        assert list(memory.slots) == [2, 3]
        assert memory.read(PAGE_SIZE, 4) is None
        assert memory.read(3 * PAGE_SIZE, 4) == bytes(4)


def test_a_block_that_is_closed_while_somebody_looks_is_in_no_slot():
    memory = MemoryMap(40)
    block = RamBlock("ram", PAGE_SIZE)

    class Meanwhile(int):
        """An address; when a slot has been compared with it, another thread deletes the slot and closes its block."""

        def __ge__(self, other):
            memory.drop(1)
            block.close()
            return super().__ge__(other)

    memory.put(MemorySlot(1, Ipa(0), PAGE_SIZE, block))
    assert memory.read(Meanwhile(0), 4) is None
