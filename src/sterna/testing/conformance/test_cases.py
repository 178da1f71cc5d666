"""Bugs that the kernel has had, each named after the commit that ended it, and what must hold instead."""

import struct
import threading
from typing import Any

import numpy as np
import pytest

from sterna.hypervisor.interface import DirtyLogMode, ExitReason, HypervisorError, MemorySlot, SlotFlags
from sterna.memory.address import PAGE_SIZE, PMD_SIZE, Ipa
from sterna.memory.bitmap import full_bitmap, page_numbers
from sterna.memory.ram import RamBlock
from sterna.testing.conformance.backends import CELL, LIST, NOWHERE, RAM, TABLES, Program
from sterna.testing.conformance.guest import (
    LOG,
    WORK,
    WORK_PAGES,
    ConformanceGuest,
    MakeGuest,
    Variant,
    wait_until,
)


def test_edde99ce_a_write_while_logging_starts_is_not_lost(make_guest: MakeGuest) -> None:
    guest = make_guest(smp=2)
    for cpu in (0, 1):
        guest.start(Program.SWEEP, WORK + cpu * 700 * PAGE_SIZE, 700, cpu << 20, cpu=cpu)
    for _ in range(5):
        guest.log()
        snapshot = guest.words.copy()
        guest.wait_change(699)
        guest.stop()
        changed = np.flatnonzero(guest.words != snapshot)
        assert changed.size
        assert set(changed.tolist()) <= set(guest.harvest())
        guest.log(False)
        for cpu in (0, 1):
            guest.resume(cpu)


def test_6dbf79e7_whoever_finds_a_page_protected_already_flushes_too(make_guest: MakeGuest) -> None:
    """Two slots are harvested by two threads while two CPUs write to both; what one protects the other sees protected."""
    guest = make_guest(smp=2)
    other = RamBlock("other", 64 * PAGE_SIZE)
    at = Ipa(WORK + (64 << 20))
    guest.blocks.append(other)
    guest.vm.set_memory_slot(MemorySlot(2, at, other.size, other, flags=LOG))
    guest.vm.harvest_dirty_log(2)
    guest.log()
    guest.start(Program.SWEEP, WORK, 64, 0, cpu=0)
    guest.start(Program.SWEEP, at, 64, 0, cpu=1)
    memories = {1: guest.ram, 2: other.data.reshape(64, PAGE_SIZE)}
    copies = {slot: memory.copy() for slot, memory in memories.items()}
    errors = []

    def harvest(slot: int) -> None:
        try:
            for _ in range(50):
                dirty = page_numbers(guest.vm.harvest_dirty_log(slot))
                copies[slot][dirty] = memories[slot][dirty]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=harvest, args=(slot,)) for slot in memories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    guest.stop()
    assert not errors
    for slot, memory in memories.items():
        dirty = page_numbers(guest.vm.harvest_dirty_log(slot))
        copies[slot][dirty] = memory[dirty]
        assert np.array_equal(copies[slot], memory)


def test_c126d94f_one_write_to_a_block_lets_one_page_through(guest: ConformanceGuest) -> None:
    guest.touch(0, WORK_PAGES)
    guest.log()
    guest.store([513])
    guest.store([514])
    assert guest.harvest() == [513, 514]
    guest.store([515])
    assert guest.harvest() == [515]


@pytest.mark.parametrize("pages", [1, 63, 64, 65, 127, 128 + 3])
def test_4ddc9204_53eac7a8_the_last_word_of_a_bitmap(make_guest: MakeGuest, pages: int) -> None:
    """Each page, cleared on its own, is protected again; its neighbours are left alone."""
    guest = make_guest(pages=pages)
    guest.log()
    edges = sorted({0, pages // 2, pages - 1})
    for _ in range(2):
        guest.store(edges)
        assert guest.harvest() == edges
    guest.touch(0, pages)
    assert guest.harvest() == list(range(pages))


def test_53eac7a8_ranges_that_clear_refuses(make_guest: MakeGuest, variant: Variant) -> None:
    if variant[1] is not DirtyLogMode.MANUAL:
        return
    guest = make_guest(pages=64 + 3)
    guest.log()
    everything = full_bitmap(guest.pages)
    for first, count in ((1, 64), (0, 65), (64, 4), (128, 64), (0, 0), (-64, 64)):
        with pytest.raises(HypervisorError):
            guest.vm.clear_dirty_log(1, first, count, everything)
    guest.touch(0, guest.pages)
    guest.vm.clear_dirty_log(1, 64, 3, full_bitmap(3))
    assert guest.harvest() == list(range(64))
    guest.touch(64, 3)
    guest.vm.clear_dirty_log(1, 0, guest.pages, everything)
    assert guest.harvest() == []


def test_3c3736cd_blocks_are_rebuilt_right_after_a_cancelled_migration(make_guest: MakeGuest) -> None:
    guest = make_guest(smp=2)
    for cpu in (0, 1):
        guest.start(Program.SWEEP, WORK + cpu * 1024 * PAGE_SIZE, 1024, cpu << 20, cpu=cpu)
    for _ in range(5):
        guest.log()
        guest.wait_change(1023)
        guest.log(False)
        guest.wait_change(2047)
    guest.stop()
    # The pages of a sweep differ by one from each other: no CPU has written to another's, or to memory that is no more.
    for cpu in (0, 1):
        steps = np.diff(guest.words[cpu * 1024 : (cpu + 1) * 1024].astype(np.int64))
        assert set(np.unique(steps).tolist()) <= {1, 1 - 1024}
    assert not guest.words[2048:].any()
    guest.touch(0, WORK_PAGES, value=9)
    assert np.all(guest.words == 9)


def test_86658b81_976d34e2_a_fault_that_finds_its_work_done_ends(make_guest: MakeGuest) -> None:
    """Two CPUs write to the same pages, which both find protected."""
    guest = make_guest(smp=2)
    for _ in range(5):
        guest.log()
        for cpu in (0, 1):
            guest.start(Program.TOUCH, WORK, 1500, 1, cpu=cpu)
        for cpu in (0, 1):
            guest.finish(cpu)
        assert guest.harvest() == list(range(1500))
        guest.log(False)


def test_be097997_a_page_that_was_read_can_be_written(guest: ConformanceGuest) -> None:
    """The CPU has a read-only translation of each page, which the write must not find again."""
    guest.log()
    pages = list(range(0, WORK_PAGES, 3))
    for _ in range(3):
        guest.load(pages)
        assert guest.harvest() == []
        guest.store(pages)
        assert guest.harvest() == pages


def test_509552e6_a_write_that_fails_is_not_logged(guest: ConformanceGuest) -> None:
    guest.set_slot(size=0)
    guest.slot = MemorySlot(1, WORK, guest.pages * PAGE_SIZE, guest.block, flags=LOG | SlotFlags.READONLY)
    guest.vm.set_memory_slot(guest.slot)
    guest.vm.harvest_dirty_log(1)
    guest.start(Program.TOUCH, WORK + 5 * PAGE_SIZE, 1, 1)
    leaving = guest.join()
    assert leaving.reason is ExitReason.INTERNAL_ERROR
    assert "write to read-only memory" in leaving.detail
    assert "0x80005000" in leaving.detail
    assert guest.harvest() == []
    assert not guest.words.any()


def test_a216e24f_less_than_a_block_is_protected_too(guest: ConformanceGuest) -> None:
    """Of a block in pages, one page is dirty: it alone is protected again, and it is."""
    guest.touch(0, 1024)
    guest.log()
    for _ in range(3):
        guest.store([700])
        assert guest.harvest() == [700]


def test_e88643ba_bits_set_during_a_harvest_are_kept(make_guest: MakeGuest) -> None:
    guest = make_guest(smp=2)
    guest.log()
    for cpu in (0, 1):
        guest.start(Program.SWEEP, WORK, 64, cpu << 20, cpu=cpu)  # all in one word of the bitmap
    copy = guest.ram.copy()
    for _ in range(100):
        dirty = guest.harvest()
        copy[dirty] = guest.ram[dirty]
    guest.stop()
    dirty = guest.harvest()
    copy[dirty] = guest.ram[dirty]
    assert np.array_equal(copy, guest.ram)


def only_kvm_x86(variant: Variant) -> bool:
    return variant[0].name == "kvm-x86_64"


def test_2fcf5c8a_a_compare_and_exchange_that_fails(make_guest: MakeGuest, variant: Variant) -> None:
    """It writes back what it has read: whether that is logged is the hardware's choice, but no other page is."""
    if not only_kvm_x86(variant):
        return
    guest = make_guest()
    guest.log()
    # mov eax, 0x5a5a5a5a; lock cmpxchg [rdi], edx; mov [r9], edx; jmp .
    guest.start(bytes.fromhex("b85a5a5a5a f00fb117 418911 ebfe"), WORK + 9 * PAGE_SIZE, 0, 1)
    guest.finish()
    assert guest.harvest() in ([], [9])
    assert not guest.words.any()


def test_c4ad98e4_a_page_walk_that_writes_is_logged(make_guest: MakeGuest, variant: Variant) -> None:
    """On x86: the walk sets accessed and dirty bits in page tables, which are pages of the guest's."""
    if not only_kvm_x86(variant):
        return
    guest = make_guest()
    size = 16 << 20
    tables = RamBlock("tables", size)
    guest.blocks.append(tables)
    at = Ipa(0x9000_0000)
    guest.vm.set_memory_slot(MemorySlot(2, at, size, tables, flags=LOG))
    guest.vm.harvest_dirty_log(2)
    # The 2 MiB of WORK in pages of 4 KiB: their table is page 3 of the slot, with neither accessed nor dirty bits.
    entries = np.arange(512, dtype=np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(WORK | 0x07)
    tables.data[3 * PAGE_SIZE : 4 * PAGE_SIZE] = entries.view(np.uint8)
    directory = guest.blocks[0].data[TABLES - RAM :].view(np.uint64)[512 * (2 + (WORK >> 30)) :]
    directory[(WORK >> 21) % 512] = at + 3 * PAGE_SIZE | 0x27
    guest.store([11])
    assert page_numbers(guest.vm.harvest_dirty_log(2)).tolist() == [3]
    after = tables.data[3 * PAGE_SIZE : 4 * PAGE_SIZE].view(np.uint64)
    assert after[11] & 0x60 == 0x60, "accessed and dirty"
    assert after[12] & 0x60 == 0


def rings(make_guest: MakeGuest, variant: Variant, **options: Any) -> ConformanceGuest | None:
    return make_guest(**options) if variant[1] is DirtyLogMode.RING else None


def test_530a8ba7_rings_that_wrap(make_guest: MakeGuest, variant: Variant) -> None:
    """Many times its size goes through a ring, and each time the pages are protected again."""
    guest = rings(make_guest, variant, ring_entries=1024)
    if guest is None:
        return
    guest.log()
    for value in range(1, 12):
        guest.touch(0, 500, value=value)
        assert guest.harvest() == list(range(500))
    assert guest.harvest() == []


def test_a_full_ring_is_emptied_by_its_vcpu(make_guest: MakeGuest, variant: Variant) -> None:
    guest = rings(make_guest, variant, ring_entries=1024)
    if guest is None:
        return
    guest.log()
    guest.touch(0, WORK_PAGES)
    assert guest.harvest() == list(range(WORK_PAGES))


def test_a_ring_filled_before_a_pause_is_harvested_in_it(make_guest: MakeGuest, variant: Variant) -> None:
    guest = rings(make_guest, variant, ring_entries=1024, smp=2)
    if guest is None:
        return
    guest.log()
    for cpu in (0, 1):
        guest.start(Program.SWEEP, WORK + cpu * 2000 * PAGE_SIZE, 2000, 0, cpu=cpu)
    wait_until(lambda: guest.words[1999] and guest.words[3999], "the first sweeps")
    guest.stop()
    assert guest.harvest() == list(range(4000))


def test_sizes_of_rings_that_are_refused(variant: Variant) -> None:
    backend, mode = variant
    if mode is not DirtyLogMode.RING or backend.missing() or not backend.name.startswith("kvm-"):
        return
    for entries, message in ((1000, "KVM_ENABLE_CAP"), (1 << 20, "at most 65536")):
        with pytest.raises(HypervisorError, match=message):
            ConformanceGuest(backend, mode, ring_entries=entries)


def test_slots_side_by_side_have_logs_of_their_own(guest: ConformanceGuest) -> None:
    others = []
    for number in (2, 3):
        block = RamBlock(f"ram{number}", 100 * PAGE_SIZE)
        guest.blocks.append(block)
        ipa = Ipa(WORK + guest.pages * PAGE_SIZE + (number - 2) * block.size)
        slot = MemorySlot(number, ipa, block.size, block, flags=LOG if number == 3 else SlotFlags.NONE)
        guest.vm.set_memory_slot(slot)
        others.append(slot)
    guest.vm.harvest_dirty_log(3)
    guest.log()
    guest.touch(WORK_PAGES - 2, 2 + 100 + 5)
    assert guest.harvest() == [WORK_PAGES - 2, WORK_PAGES - 1]
    assert page_numbers(guest.vm.harvest_dirty_log(3)).tolist() == list(range(5))
    with pytest.raises(HypervisorError, match="slot"):
        guest.vm.harvest_dirty_log(2)


def test_a_slot_that_moves_keeps_its_log(guest: ConformanceGuest) -> None:
    guest.log()
    guest.store([1, 2, 600])
    guest.set_slot(ipa=Ipa(WORK + PMD_SIZE + PAGE_SIZE))
    guest.store([3])
    assert guest.harvest() == [1, 2, 3, 600]
    guest.start(Program.TOUCH, WORK, 1, 1)
    leaving = guest.join()
    assert leaving.reason is ExitReason.INTERNAL_ERROR
    assert "outside memory" in leaving.detail
    assert f"{WORK:#x}" in leaving.detail


def test_a_slot_deleted_under_a_running_guest(guest: ConformanceGuest) -> None:
    guest.start(Program.SWEEP, WORK, 100, 0)
    wait_until(lambda: guest.words[99] != 0, "a sweep")
    guest.set_slot(size=0)
    frozen = guest.words.copy()
    assert "outside memory" in guest.join().detail
    assert np.array_equal(guest.words, frozen)


def test_a_new_slot_with_an_old_number_starts_clean(guest: ConformanceGuest) -> None:
    guest.log()
    guest.touch(0, 200)
    guest.set_slot(size=0)
    guest.slot = MemorySlot(1, WORK, 100 * PAGE_SIZE, guest.block, flags=LOG)
    guest.vm.set_memory_slot(guest.slot)
    if guest.mode is DirtyLogMode.MANUAL:
        guest.vm.harvest_dirty_log(1)
    guest.store([7])
    assert guest.harvest() == [7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot": 2, "ipa": WORK + 1}, "multiples of 4096"),
        ({"slot": 2, "size": 100}, "multiples of 4096"),
        ({"slot": 2, "offset": PAGE_SIZE}, "past the end"),
        ({"slot": 2, "ipa": WORK + PMD_SIZE}, "overlaps memory slot 1"),
        ({"size": PMD_SIZE}, "cannot change"),
        ({"flags": SlotFlags.READONLY}, "READONLY"),
        ({"slot": 7, "size": 0}, "none to delete"),
    ],
)
def test_slots_that_are_refused(guest: ConformanceGuest, changes: dict[str, Any], message: str) -> None:
    slot = guest.slot
    with pytest.raises(HypervisorError, match=message):
        guest.set_slot(**changes)
    guest.slot = slot
    guest.log()
    guest.store([1])
    assert guest.harvest() == [1]


def test_kicked_before_it_runs(guest: ConformanceGuest) -> None:
    guest.cpus[0].kick()
    guest.start(Program.SPIN)
    assert guest.join().reason is ExitReason.INTR


def test_an_access_that_was_not_finished_is_no_part_of_a_state_that_is_set(guest: ConformanceGuest) -> None:
    """A load from nowhere ends the run in the middle: what is left of it belongs to the state that is given up."""
    guest.start(Program.SPIN)
    guest.stop()
    cpu = guest.cpus[0]
    state = cpu.get_state()
    for get_between in (False, True):
        guest.write(LIST, struct.pack("<I", NOWHERE))
        guest.start(Program.LOAD_LIST, LIST, 1)
        assert "access outside memory" in guest.join().detail
        if get_between:
            cpu.get_state()
        cpu.set_state(state)
        cpu.kick()
        assert cpu.run().reason is ExitReason.INTR
        assert guest.backend.general(cpu.get_state()) == guest.backend.general(state)


def test_kicked_again_and_again(make_guest: MakeGuest) -> None:
    guest = make_guest(smp=2)
    guest.write(CELL, b"\1\0\0\0")
    for cpu in (0, 1):
        guest.start(Program.SCATTER, WORK, guest.pages, CELL, cpu, cpu=cpu)
    for _ in range(100):
        guest.stop()
        for cpu in (0, 1):
            guest.resume(cpu)
    guest.stop()
    assert set(np.unique(guest.words).tolist()) <= {0, 1}
