"""Dirty logging of a real (emulated) CPU's writes, through tables that its own MMU walks."""

from functools import partial

import numpy as np
import pytest
from tests.hypervisor.conftest import LOG, powered_off, wait_until
from tests.hypervisor.programs import CODE, JUMP, POWER_OFF, RAM, TOUCH, TOUCH_FOREVER, load, word
from tests.stage2.support import write as stage2_write
from unicorn.arm_const import UC_ARM_REG_PC, UC_ARM_REG_R0

from sterna.hypervisor.emulated import vm
from sterna.hypervisor.interface import HypervisorError, ManualProtect, MemorySlot, SlotFlags
from sterna.memory.address import PAGE_SIZE, PMD_SIZE, Ipa
from sterna.memory.bitmap import count, full_bitmap, page_numbers
from sterna.memory.ram import RamBlock
from sterna.stage2.state import MAX_SLOTS
from sterna.stage2.tables import Stage2

WORK = RAM + 4 * PMD_SIZE
FIRST = 4 * 512  # its page number


def test_log_holds_exactly_the_pages_written(guest):
    guest.log()
    assert powered_off(guest.run(TOUCH, r0=WORK, r1=700, r2=1))
    assert list(page_numbers(guest.vm.get_dirty_log(0))) == list(range(FIRST, FIRST + 700))
    assert not guest.vm.get_dirty_log(0).any()


def test_second_write_is_seen_again(guest):
    """A CPU with a writable TLB entry from the pass before must fault again: the flush is what this tests."""
    guest.log()
    guest.run(TOUCH, r0=WORK, r1=100, r2=1)
    guest.vm.get_dirty_log(0)
    guest.run(TOUCH, r0=WORK, r1=100, r2=2)
    assert count(guest.vm.get_dirty_log(0)) == 100


def test_running_guest_loses_no_write(guest):
    """The kernel selftest's oracle (dirty_log_test): a page that is clean was not written since the harvest before.

    The guest sweeps over its pages for ever. After the last harvest of a stopped guest every page must hold what a copy made
    from the harvests holds: each batch's pages are copied after the harvest has returned, as a migration sends them.
    """
    pages = 1500
    guest.log()
    guest.program(TOUCH_FOREVER, r0=WORK, r1=pages, r2=0)
    guest.start()
    copy = guest.block.data.copy()
    ram = guest.block.data.reshape(-1, PAGE_SIZE)
    for _ in range(40):
        before = word(guest.block, WORK)
        wait_until(lambda before=before: word(guest.block, WORK) != before, "the guest's next sweep")
        dirty = page_numbers(guest.vm.get_dirty_log(0))
        copy.reshape(-1, PAGE_SIZE)[dirty] = ram[dirty]
    guest.stop()
    dirty = page_numbers(guest.vm.get_dirty_log(0))
    copy.reshape(-1, PAGE_SIZE)[dirty] = ram[dirty]
    assert np.array_equal(copy, guest.block.data)


def test_two_cpus_share_one_log(make_guest):
    guest = make_guest(smp=2, secondaries_off=False)
    guest.log()
    guest.program(TOUCH, cpu=0, r0=WORK, r1=900, r2=1)
    guest.program(TOUCH, cpu=1, r0=WORK + 900 * PAGE_SIZE, r1=900, r2=1)
    guest.start()
    guest.finish(0)
    guest.finish(1)
    assert list(page_numbers(guest.vm.get_dirty_log(0))) == list(range(FIRST, FIRST + 1800))


@pytest.mark.slow
def test_two_cpus_on_the_same_pages_under_harvest(make_guest):
    guest = make_guest(smp=2, secondaries_off=False)
    guest.log()
    for cpu in (0, 1):
        guest.program(TOUCH_FOREVER, cpu=cpu, r0=WORK, r1=300, r2=cpu << 20)
    guest.start()
    ram = guest.block.data.reshape(-1, PAGE_SIZE)
    copy = ram.copy()
    for _ in range(40):
        before = word(guest.block, WORK)
        wait_until(lambda before=before: word(guest.block, WORK) != before, "the guest's next sweep")
        dirty = page_numbers(guest.vm.get_dirty_log(0))
        copy[dirty] = ram[dirty]
    guest.stop()
    dirty = page_numbers(guest.vm.get_dirty_log(0))
    copy[dirty] = ram[dirty]
    assert np.array_equal(copy, ram)


def test_blocks_dissolve_and_come_back(guest):
    guest.run(TOUCH, r0=WORK, r1=2048, r2=1)
    before = guest.vm.statistics()
    assert before["blocks_2m"] >= 4
    guest.log()
    guest.run(TOUCH, r0=WORK, r1=2048, r2=2)
    during = guest.vm.statistics()
    assert during["blocks_dissolved"] >= 4
    assert during["blocks_2m"] <= before["blocks_2m"] - 4
    guest.vm.get_dirty_log(0)
    guest.log(on=False)
    guest.run(TOUCH, r0=WORK, r1=2048, r2=3)
    after = guest.vm.statistics()
    assert after["blocks_2m"] == before["blocks_2m"]
    assert after["tables"] == before["tables"]


def all_pages_wait_for_a_flush(guest):
    """The pool's free pages become such as were taken out of the tables."""
    state = guest.vm.stage2.state[0]
    assert not state["pool_retired"]
    state["pool_retired"], state["pool_free"] = state["pool_free"], 0
    state["pool_retired_last"] = state["pool_pages"]


@pytest.mark.parametrize("generic", [False, True])
def test_vcpus_that_need_tables_flush_for_those_taken_out(make_guest, generic):
    guest = make_guest(smp=2, secondaries_off=False, generic_flush=generic)
    guest.run(TOUCH, r0=WORK, r1=1024, r2=1)
    guest.log()
    all_pages_wait_for_a_flush(guest)
    for cpu in (0, 1):
        guest.program(TOUCH, cpu=cpu, r0=WORK + cpu * PMD_SIZE, r1=512, r2=2)
    flushes = guest.vm.statistics()["flushes"]
    guest.start()
    assert powered_off(guest.finish(0))
    assert powered_off(guest.finish(1))
    assert list(page_numbers(guest.vm.get_dirty_log(0))) == list(range(FIRST, FIRST + 1024))
    assert guest.vm.statistics()["flushes"] == flushes + 2, "one for the tables, one for the log"


@pytest.mark.slow
@pytest.mark.parametrize("generic", [False, True])
def test_a_pool_that_is_just_enough(make_guest, monkeypatch, generic):
    """Two vCPUs dissolve and rebuild blocks, and wait for pages, while a third thread flushes for its own reasons."""
    # The root's two pages, the table of blocks, one for each block, and one more.
    monkeypatch.setattr(vm, "Stage2", partial(Stage2, pool_size=(2 + 1 + 16 + 1) * PAGE_SIZE))
    guest = make_guest(smp=2, secondaries_off=False, generic_flush=generic)
    pages = 6 * 512
    starts = (WORK, WORK + 6 * PMD_SIZE)
    for cpu, start in enumerate(starts):
        guest.program(TOUCH_FOREVER, cpu=cpu, r0=start, r1=pages, r2=0)
    guest.start()
    for _ in range(20):
        for on in (True, False):
            guest.log(on)
            for start in starts:
                before = word(guest.block, start)
                wait_until(
                    lambda before=before, start=start: word(guest.block, start) != before or guest.exits,
                    "the guests' next sweeps",
                )
        guest.vm.unmap_range(Ipa(WORK), 2 * PMD_SIZE)
    assert not guest.exits
    guest.stop()
    words = guest.block.data.view(np.uint32)[:: PAGE_SIZE // 4]
    for start in starts:
        first = (start - RAM) // PAGE_SIZE
        steps = np.diff(words[first : first + pages].astype(np.int64))
        assert set(np.unique(steps).tolist()) <= {0, -1}, (
            "each page has the sweep's number, or that of the one before"
        )


def test_a_device_gets_tables_that_wait_for_a_flush(guest):
    all_pages_wait_for_a_flush(guest)
    guest.vm.add_mmio(Ipa(0x900_0000), PAGE_SIZE, None)
    assert guest.vm.statistics()["flushes"] == 1
    guest.vm.add_mmio(Ipa(0xA00_0000), PAGE_SIZE, None)
    assert guest.vm.statistics()["flushes"] == 1


def test_without_tables_to_be_had_the_guest_stops(guest):
    state = guest.vm.stage2.state[0]
    free, state["pool_free"] = int(state["pool_free"]), 0
    report = guest.run(TOUCH, r0=WORK, r1=1, r2=1)
    state["pool_free"] = free
    assert "no page-table page left: stage-2 translation fault in the page at IPA" in report.detail
    assert guest.vm.statistics()["flushes"] == 0


def test_flush_counters_of_the_two_forms(make_guest):
    for generic in (False, True):
        guest = make_guest(generic_flush=generic)
        guest.program(TOUCH_FOREVER, r0=WORK, r1=10, r2=0)
        guest.start()
        wait_until(lambda guest=guest: word(guest.block, WORK) != 0, "the guest's first write")
        guest.log()
        statistics = guest.vm.statistics()
        assert statistics["flushes"] == 1
        assert statistics["flush_broadcasts"] == (0 if generic else 1)
        assert statistics["flush_requests"] == (1 if generic else 0)
        assert statistics["flush_vcpu_exits"] == (1 if generic else 0)


def test_manual_protect_on_a_running_guest(guest):
    guest.vm.enable_manual_protect(ManualProtect.ENABLE | ManualProtect.INITIALLY_SET)
    guest.log()
    pages = guest.slot.size // PAGE_SIZE
    assert count(guest.vm.get_dirty_log(0)) == pages
    guest.vm.clear_dirty_log(0, 0, pages, full_bitmap(pages))
    guest.run(TOUCH, r0=WORK, r1=5, r2=1)
    assert list(page_numbers(guest.vm.get_dirty_log(0))) == list(range(FIRST, FIRST + 5))
    with pytest.raises(HypervisorError, match="slot 0"):
        guest.vm.clear_dirty_log(0, 1, 64, full_bitmap(64))


def test_host_write_is_logged_only_while_logging(guest):
    guest.vm.mark_dirty(0, 3, 2)
    guest.log()
    assert not guest.vm.get_dirty_log(0).any()
    guest.vm.mark_dirty(0, 3, 2)
    assert list(page_numbers(guest.vm.get_dirty_log(0))) == [3, 4]


def test_slot_deleted_under_a_running_guest(guest):
    """The flush of a deletion is awaited: afterwards the guest cannot write through an old translation."""
    second = RamBlock("second", PMD_SIZE)
    guest.vm.set_memory_slot(MemorySlot(1, Ipa(0x8000_0000), PMD_SIZE, second))
    guest.program(TOUCH_FOREVER, r0=0x8000_0000, r1=100, r2=0)
    guest.start()
    wait_until(lambda: second.data[:4].any(), "the guest's first write")
    guest.vm.set_memory_slot(MemorySlot(1, Ipa(0x8000_0000), 0, second))
    frozen = second.data.copy()
    assert "outside memory" in guest.finish().detail
    assert np.array_equal(frozen, second.data)


def test_slot_moved(guest):
    second = RamBlock("second", PMD_SIZE)
    slot = MemorySlot(1, Ipa(0x8000_0000), PMD_SIZE, second, flags=LOG)
    guest.vm.set_memory_slot(slot)
    guest.run(TOUCH, r0=0x8000_0000, r1=3, r2=7)
    guest.vm.set_memory_slot(MemorySlot(1, Ipa(0x9000_0000), PMD_SIZE, second, flags=LOG))
    assert "0x80000000" in guest.run(TOUCH, r0=0x8000_0000, r1=1, r2=8).detail
    guest.run(TOUCH, r0=0x9000_0000, r1=2, r2=9)
    assert second.data[0] == 9
    assert list(page_numbers(guest.vm.get_dirty_log(1))) == [0, 1, 2]


def test_a_slot_that_moves_loses_no_write_of_meanwhile(guest):
    """Whoever writes while it moves, before, between and after."""
    there, other = Ipa(0x8000_0000), Ipa(0x9000_0000)
    block = RamBlock("moves", PMD_SIZE)
    guest.vm.set_memory_slot(MemorySlot(1, there, PMD_SIZE, block))
    guest.run(TOUCH, r0=there, r1=512, r2=7)
    guest.vm.set_memory_slot(MemorySlot(1, there, PMD_SIZE, block, flags=LOG))
    stage2 = guest.vm.stage2
    remove, insert = stage2.remove_slot, stage2.insert_slot

    def remove_slot(number):
        stage2_write(stage2, there + 3 * PAGE_SIZE)
        guest.vm.mark_dirty(1, 5, 1)
        remove(number)
        guest.vm.mark_dirty(1, 7, 1)

    def insert_slot(*arguments, **options):
        guest.vm.mark_dirty(1, 9, 1)
        insert(*arguments, **options)
        stage2_write(stage2, other + 11 * PAGE_SIZE)
        guest.vm.mark_dirty(1, 13, 1)

    stage2.remove_slot, stage2.insert_slot = remove_slot, insert_slot
    guest.vm.set_memory_slot(MemorySlot(1, other, PMD_SIZE, block, flags=LOG))
    stage2.remove_slot, stage2.insert_slot = remove, insert
    assert list(page_numbers(guest.vm.get_dirty_log(1))) == [3, 5, 7, 9, 11, 13]
    guest.run(TOUCH, r0=other, r1=2, r2=9)
    assert list(page_numbers(guest.vm.get_dirty_log(1))) == [0, 1]


def test_a_slot_may_start_and_stop_its_log_as_it_moves(guest):
    block = RamBlock("moves", PMD_SIZE)
    for at, flags in ((0x8000_0000, SlotFlags.NONE), (0x9000_0000, LOG), (0xA000_0000, SlotFlags.NONE)):
        guest.vm.set_memory_slot(MemorySlot(1, Ipa(at), PMD_SIZE, block, flags=flags))
        guest.run(TOUCH, r0=at, r1=2, r2=9)
        if flags == LOG:
            assert list(page_numbers(guest.vm.get_dirty_log(1))) == [0, 1]
        else:
            with pytest.raises(HypervisorError, match="ENOENT"):
                guest.vm.get_dirty_log(1)
    assert guest.vm.stage2.entry(Ipa(0xA000_0000))[1] == 2, "a block, as without a log"


THERE = Ipa(0x8000_0000)


def ram_regions(guest):
    return sorted(region for region in guest.cpus[0].engine.uc.mem_regions() if region[0] >= 1 << 37)


def test_new_ram_where_closed_ram_was(guest):
    """The host gives memory out again: a block may begin where one did that is no more."""
    before = ram_regions(guest)
    larger = RamBlock("larger", 200 * PAGE_SIZE)
    smaller = RamBlock("smaller", 100 * PAGE_SIZE)
    smaller.hva, smaller.data = larger.hva, larger.data[: smaller.size]
    for block in (smaller, larger, smaller):
        guest.vm.set_memory_slot(MemorySlot(1, THERE, block.size, block))
        pages = block.size // PAGE_SIZE
        assert powered_off(guest.run(TOUCH, r0=THERE, r1=pages, r2=pages))
        assert np.all(block.data.view(np.uint32)[:: PAGE_SIZE // 4] == pages)
        guest.vm.set_memory_slot(MemorySlot(1, THERE, 0, block))
        assert ram_regions(guest) == before, "a CPU still has memory that may be closed"


def test_ram_stays_for_its_other_slots(guest):
    block = RamBlock("halves", 2 * PMD_SIZE)
    for number in (1, 2):
        at = Ipa(THERE + number * PMD_SIZE)
        guest.vm.set_memory_slot(MemorySlot(number, at, PMD_SIZE, block, (number - 1) * PMD_SIZE))
    guest.vm.set_memory_slot(MemorySlot(1, THERE, 0, block))
    assert powered_off(guest.run(TOUCH, r0=THERE + 2 * PMD_SIZE, r1=1, r2=5))
    assert block.data[PMD_SIZE] == 5


def test_a_slot_that_cannot_be_leaves_no_ram_behind(guest):
    block = RamBlock("one", PAGE_SIZE)
    for number in range(1, MAX_SLOTS):
        guest.vm.set_memory_slot(MemorySlot(number, Ipa(THERE + number * PAGE_SIZE), PAGE_SIZE, block))
    before = ram_regions(guest)
    with pytest.raises(HypervisorError, match=f"at most {MAX_SLOTS} slots"):
        guest.vm.set_memory_slot(MemorySlot(MAX_SLOTS, THERE, PAGE_SIZE, RamBlock("other", PAGE_SIZE)))
    assert ram_regions(guest) == before


def test_physical_memory_is_not_used_up_by_ram_that_goes(guest):
    """There is room for 896 blocks of a GiB at a time."""
    blocks = [RamBlock(name, PAGE_SIZE) for name in "abc"]
    for number, block in enumerate(blocks, 1):
        guest.vm.set_memory_slot(MemorySlot(number, Ipa(THERE + number * PAGE_SIZE), PAGE_SIZE, block))
    before = ram_regions(guest)
    slot = MemorySlot(2, Ipa(THERE + 2 * PAGE_SIZE), PAGE_SIZE, blocks[1])
    for _ in range(900):
        guest.vm.set_memory_slot(MemorySlot(2, THERE, 0, blocks[1]))
        guest.vm.set_memory_slot(slot)
    assert ram_regions(guest) == before
    assert powered_off(guest.run(TOUCH, r0=THERE + PAGE_SIZE, r1=3, r2=9))
    assert [int(block.data[0]) for block in blocks] == [9, 9, 9]


def test_a_guest_runs_the_code_of_the_ram_that_is_there(guest):
    """What a CPU has translated goes with its memory, also where its state, whose setting discards all, stays."""
    guest.program(JUMP)
    cpu = guest.cpus[0]
    for value in (1, 2):
        with RamBlock("code", PAGE_SIZE) as block:
            load(block, [0xE3A05000 | value, *POWER_OFF], RAM)  # mov r5, #value
            guest.vm.set_memory_slot(MemorySlot(1, THERE, PAGE_SIZE, block))
            cpu.engine.uc.reg_write(UC_ARM_REG_PC, CODE)
            cpu.engine.uc.reg_write(UC_ARM_REG_R0, THERE)
            guest.start(0)
            assert powered_off(guest.finish(0))
            assert cpu.get_state().regs[5] == value
            guest.vm.set_memory_slot(MemorySlot(1, THERE, 0, block))


def test_readonly_slot(guest):
    rom = RamBlock("rom", PMD_SIZE)
    guest.vm.set_memory_slot(MemorySlot(1, Ipa(0x8000_0000), PMD_SIZE, rom, flags=SlotFlags.READONLY))
    report = guest.run(TOUCH, r0=0x8000_0000, r1=1, r2=1)
    assert "read-only" in report.detail
    assert "0x80000000" in report.detail
    assert not rom.data.any()


def test_host_takes_pages_away_and_ages(guest):
    guest.run(TOUCH, r0=WORK, r1=600, r2=1)
    guest.vm.unmap_range(Ipa(WORK), PMD_SIZE)
    assert guest.vm.age_range(RAM, guest.slot.size) == 2
    guest.run(TOUCH, r0=WORK, r1=600, r2=2)
    assert word(guest.block, WORK) == 2
    assert guest.vm.statistics()["faults_access_flag"] >= 1


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ({"ipa": RAM + 1}, "multiples of 4096"),
        ({"size": 100}, "multiples of 4096"),
        ({"size": 64 << 20}, "past the end"),
        ({"offset": 4096}, "past the end"),
        ({"ipa": (1 << 40) - 4096}, "40-bit"),
        ({"ipa": RAM + PMD_SIZE}, "overlaps memory slot 0"),
        ({"slot": 0, "ipa": 0x8000_0000, "size": PMD_SIZE}, "cannot change"),
        ({"slot": 0, "flags": SlotFlags.READONLY}, "READONLY"),
        ({"slot": 7, "size": 0}, "none to delete"),
    ],
)
def test_slots_that_are_refused(guest, slot, message):
    fields = {"slot": 1, "ipa": RAM, "size": guest.slot.size, "offset": 0, "flags": SlotFlags.NONE, **slot}
    with pytest.raises(HypervisorError, match=message):
        guest.vm.set_memory_slot(
            MemorySlot(
                fields["slot"],
                Ipa(fields["ipa"]),
                fields["size"],
                guest.block,
                fields["offset"],
                fields["flags"],
            )
        )


def test_log_of_no_slot_or_no_log(guest):
    with pytest.raises(HypervisorError, match="slot 9"):
        guest.vm.get_dirty_log(9)
    with pytest.raises(HypervisorError, match="ENOENT"):
        guest.vm.get_dirty_log(0)
    with pytest.raises(HypervisorError, match="INITIALLY_SET needs ENABLE"):
        guest.vm.enable_manual_protect(ManualProtect.INITIALLY_SET)
