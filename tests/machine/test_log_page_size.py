"""A hypervisor's dirty log has pages of its own size; migration goes on in pages of 4 KiB."""

import time
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from tests.machine.coarse import PAGES, CoarseVm
from tests.migration.pairs import TCP, Host

from sterna.guests.check import check_ram
from sterna.guests.layout import DirtyramWord, StatusError, read_status_of_ram
from sterna.hypervisor.accelerator import ACCELERATORS
from sterna.hypervisor.accelerators.emulated import ACCELERATOR, emulated_vm
from sterna.hypervisor.emulated.vm import EmulatedVm
from sterna.hypervisor.interface import DirtyLogMode, HypervisorError, ManualProtect, MemorySlot
from sterna.machine.config import ConfigError, MachineConfig
from sterna.machine.guestram import GuestRam
from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.memory.bitmap import page_numbers
from sterna.memory.ram import RamBlock
from sterna.migration.statistics import MigrationStatus

TIMEOUT_S = 300
RAM_BASE = Ipa(0x4000_0000)
SIZE = 8 << 20


@pytest.fixture
def ram():
    vm = CoarseVm(1)
    with RamBlock("ram", SIZE) as block:
        ram = GuestRam(vm, block, RAM_BASE)
        ram.start_logging()
        yield ram
        vm.close()
        del ram


@pytest.mark.parametrize(
    ("at", "size", "dirty"),
    [
        (0, 1, range(PAGES)),
        (5 * PAGE_SIZE - 1, 2, range(PAGES)),
        (PAGES * PAGE_SIZE - 1, 2, range(2 * PAGES)),
        (PAGES * PAGE_SIZE, 1, range(PAGES, 2 * PAGES)),
        (SIZE - 1, 1, range(SIZE // PAGE_SIZE - PAGES, SIZE // PAGE_SIZE)),
    ],
)
def test_a_write_makes_all_pages_dirty_that_the_log_has_in_one(ram, at, size, dirty):
    ram.write(RAM_BASE + at, b"x" * size)
    assert page_numbers(ram.peek().words).tolist() == list(dirty)
    assert page_numbers(ram.harvest().words).tolist() == list(dirty)
    assert not ram.harvest().words.any()


def test_slots_are_whole_pages_of_the_log():
    with RamBlock("ram", SIZE) as block:
        for vm in (EmulatedVm(1), CoarseVm(1)):
            unit = 1 << vm.log_page_bits
            for slot in (
                MemorySlot(0, RAM_BASE, SIZE - unit // 2, block),
                MemorySlot(0, Ipa(RAM_BASE + unit // 2), unit, block),
                MemorySlot(0, RAM_BASE, unit, block, unit // 2),
            ):
                with pytest.raises(HypervisorError, match=f"must be multiples of {unit}"):
                    vm.set_memory_slot(slot)
            vm.set_memory_slot(MemorySlot(0, Ipa(RAM_BASE + unit), unit, block, unit))
            vm.set_memory_slot(MemorySlot(0, Ipa(RAM_BASE + unit), 0, block))
            vm.close()


def test_a_log_that_starts_full_is_cleared_in_its_own_pages():
    vm = CoarseVm(1)
    vm.enable_manual_protect(ManualProtect.ENABLE | ManualProtect.INITIALLY_SET)
    with RamBlock("ram", SIZE) as block:
        ram = GuestRam(vm, block, RAM_BASE, initially_set=True)
        ram.start_logging()
        ram.write(RAM_BASE + 100 * PAGE_SIZE, b"x")
        assert page_numbers(vm.get_dirty_log(0)).tolist() == [100 // PAGES]
        assert page_numbers(ram.harvest().words).tolist() == list(range(96, 112))
        assert not ram.harvest().words.any()
        vm.close()
        del ram


@pytest.fixture
def make(monkeypatch):
    """Hosts with a machine each, whose hypervisor may be `coarse`."""
    coarse = replace(ACCELERATOR, name="coarse", create=partial(emulated_vm, CoarseVm))
    monkeypatch.setitem(ACCELERATORS._items, "coarse", coarse)
    made = []

    def make(**settings):
        machine = Machine(MachineConfig(**{"memory_bytes": 64 << 20} | settings))
        made.append(Host(MigratableMachine(machine)))
        return made[-1]

    yield make
    for host in made:
        host.controller.close()
        host.guest.machine.close()


def test_ram_is_whole_pages_of_the_log(make):
    size = (64 << 20) + PAGE_SIZE
    make(memory_bytes=size)
    with pytest.raises(ConfigError, match=f"{size} bytes is not a multiple of 65536 bytes"):
        make(memory_bytes=size, accel="coarse")


def wait_for(host, condition):
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            status = read_status_of_ram(host.guest.ram_blocks[0].data)
            if status.steps() and condition(status):
                return
        except StatusError:
            pass  # it has not come that far
        assert host.guest.machine.error is None
        assert time.monotonic() < end
        time.sleep(0.001)


def goes_on(host):
    """The guest runs here, and its memory is what it must have written."""
    steps = read_status_of_ram(host.guest.ram_blocks[0].data).steps()
    wait_for(host, lambda status: status.steps() > steps + 3)
    host.guest.machine.stop()
    assert check_ram(host.guest.ram_blocks[0].data) == []
    host.guest.machine.cont()


@pytest.mark.parametrize("mode", [DirtyLogMode.BITMAP, DirtyLogMode.MANUAL])
def test_a_running_guest_moves_between_logs_of_any_page_size(make, mode):
    """Only the log's owner knows of its pages: what is sent, and the other end, are as always."""
    hosts = [make(accel="coarse", dirty_log=mode, kernel="dirtyram", append="8000 800 1")]
    hosts += [make(accel=name, dirty_log=mode, incoming=True) for name in ("coarse", "emulated", "coarse")]
    hosts[0].guest.machine.cont()
    wait_for(hosts[0], lambda status: status.word(0, DirtyramWord.PASSES))
    for source, destination in pairwise(hosts):
        info = source.migrate(destination.controller.incoming(TCP))
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert info.verified
        if source.guest.machine.config.accel == "coarse":
            assert all(done.dirty_pages % PAGES == 0 for done in info.passes)
        goes_on(destination)
