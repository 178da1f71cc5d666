"""The same history on every hypervisor gives the same bitmaps and the same memory."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sterna.hypervisor.interface import DirtyLogMode, MemorySlot, SlotFlags
from sterna.memory.address import PAGE_SIZE, PMD_SIZE, Ipa
from sterna.memory.bitmap import page_numbers
from sterna.memory.ram import RamBlock
from sterna.testing.conformance.backends import Backend
from sterna.testing.conformance.guest import LOG, WORK, ConformanceGuest

STEPS = 60
SLOTS = (2, 3, 4)
PAGES = {2: 4 * 512 + 3, 3: 65, 4: 700}
PLACES = {
    number: [Ipa(WORK + (number * 4 + place) * (16 << 20) + place * PAGE_SIZE) for place in range(3)]
    for number in SLOTS
}

Memory = dict[int, NDArray[np.uint8]]


@dataclass
class Replay:
    """A history applied to one hypervisor, and what it gave."""

    guest: ConformanceGuest
    blocks: dict[int, RamBlock] = field(default_factory=dict)
    slots: dict[int, MemorySlot] = field(default_factory=dict)
    seen: list[list[int]] = field(default_factory=list)

    def create(self, number: int, place: int, offset: int, flags: SlotFlags) -> None:
        block = self.blocks.setdefault(number, RamBlock(f"ram{number}", PAGES[number] * PAGE_SIZE + PMD_SIZE))
        self.apply(MemorySlot(number, PLACES[number][place], PAGES[number] * PAGE_SIZE, block, offset, flags))

    def apply(self, slot: MemorySlot) -> None:
        before = self.slots.get(slot.slot)
        self.guest.vm.set_memory_slot(slot)
        self.slots[slot.slot] = slot
        fresh = slot.flags & LOG and not (before is not None and before.flags & LOG)
        if fresh and self.guest.mode is DirtyLogMode.MANUAL:
            self.guest.vm.harvest_dirty_log(slot.slot)

    def change(self, number: int, **changes: Any) -> None:
        self.apply(replace(self.slots[number], **changes))

    def delete(self, number: int) -> None:
        self.guest.vm.set_memory_slot(MemorySlot(number, Ipa(0), 0, self.blocks[number]))
        del self.slots[number]

    def write(self, number: int, pages: list[int], value: int) -> None:
        self.guest.slot = self.slots[number]
        self.guest.store(pages, value)

    def host_write(self, number: int, first: int, count: int) -> None:
        self.guest.vm.mark_dirty(number, first, count)

    def harvest(self, number: int) -> None:
        self.seen.append(page_numbers(self.guest.vm.harvest_dirty_log(number)).tolist())


def history(seed: int) -> Iterator[tuple[Any, ...]]:
    """Calls of a `Replay`, such that each is possible after those before."""
    rng = random.Random(seed)
    logged: dict[int, bool] = {}
    for value in range(1, STEPS + 1):
        number = rng.choice(SLOTS)
        if number not in logged:
            logged[number] = rng.random() < 0.5
            offset = rng.choice((0, PAGE_SIZE, 17 * PAGE_SIZE, PMD_SIZE))
            yield "create", number, rng.randrange(3), offset, LOG if logged[number] else SlotFlags.NONE
            continue
        kinds = ["write"] * 6 + ["host_write", "move", "log", "log"] + ["harvest"] * 4
        kind = rng.choice([*kinds, "delete"])
        if kind == "write":
            near = rng.randrange(PAGES[number])
            pages = [rng.randrange(PAGES[number]) for _ in range(rng.randrange(1, 40))]
            pages += [page for page in range(near, near + 70) if page < PAGES[number]]
            yield "write", number, pages, value
        elif kind == "host_write":
            first = rng.randrange(PAGES[number])
            yield "host_write", number, first, rng.randrange(1, PAGES[number] - first + 1)
        elif kind == "move":
            yield "change", number, {"ipa": PLACES[number][rng.randrange(3)]}
        elif kind == "log":
            logged[number] = not logged[number]
            yield "change", number, {"flags": LOG if logged[number] else SlotFlags.NONE}
        elif kind == "delete":
            del logged[number]
            yield "delete", number
        elif logged[number]:
            yield "harvest", number
    for number, on in sorted(logged.items()):
        if on:
            yield "harvest", number


def replay(backend: Backend, mode: DirtyLogMode, seed: int) -> tuple[list[list[int]], Memory]:
    """What a history shows on one hypervisor, and the memory of each slot after it."""
    guest = ConformanceGuest(backend, mode, pages=1)
    run = Replay(guest)
    try:
        for name, *arguments in history(seed):
            if name == "change":
                run.change(arguments[0], **arguments[1])
            else:
                getattr(run, name)(*arguments)
        memory = {number: block.data.copy() for number, block in sorted(run.blocks.items())}
        return run.seen, memory
    finally:
        guest.close()
        for block in run.blocks.values():
            block.close()


@pytest.mark.parametrize("seed", range(6))
def test_same_history_same_bitmaps(seed: int, to_compare: tuple[Backend, ...]) -> None:
    there = [(backend, mode) for backend in to_compare if not backend.missing() for mode in backend.modes]
    if len(there) < 2:
        pytest.skip("there is one hypervisor here only: nothing to compare")
    results = {f"{backend.name}-{mode}": replay(backend, mode, seed) for backend, mode in there}
    (name, (seen, memory)), *others = results.items()
    assert any(seen), "a history that shows nothing"
    for other, (other_seen, other_memory) in others:
        assert other_seen == seen, f"{other} and {name} differ"
        for number, data in memory.items():
            assert np.array_equal(data, other_memory[number]), f"{other} and {name}: memory of slot {number}"
