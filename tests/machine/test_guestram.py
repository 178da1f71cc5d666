"""Guest RAM's dirty log, switched on and off under a machine's guest."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from tests.hypervisor.programs import TOUCH_FOREVER

from sterna.hypervisor.emulated.vm import EmulatedVm
from sterna.hypervisor.interface import HypervisorError, ManualProtect, SlotFlags
from sterna.machine.guestram import GuestRam
from sterna.machine.migratable import MigratableMachine as Guest
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.memory.bitmap import page_numbers
from sterna.memory.ram import RamBlock

TIMEOUT_S = 300
RAM_BASE = 0x4000_0000
WORK_PAGE = 2048
WORK_PAGES = 1024
"""Two blocks of 2 MiB."""


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def machine(make_machine, make_kernel):
    """It writes all of its pages over and over."""
    made = make_machine(kernel=make_kernel(TOUCH_FOREVER))
    state = made.hardware.platform.vcpus[0].get_state()
    state.regs[0], state.regs[1] = RAM_BASE + WORK_PAGE * PAGE_SIZE, WORK_PAGES
    made.hardware.platform.vcpus[0].set_state(state)
    return made


def await_sweep(machine) -> None:
    """Wait until the guest, which runs, has written each of its pages."""
    work = machine.ram_blocks[0].data.view(np.uint32)[WORK_PAGE * 1024 :: 1024][:WORK_PAGES]
    before = work.copy()
    wait(lambda: bool(np.all(work != before)))


def sweep(machine) -> None:
    """Let the guest run until it has written each of its pages, and stop it."""
    machine.cont()
    await_sweep(machine)
    machine.stop()
    assert machine.error is None


@pytest.mark.parametrize("harvested", [False, True])
def test_blocks_come_back_after_logging_though_their_pages_were_writable_at_its_end(
    machine, harvested: bool
) -> None:
    """All pages have been written since the last look at the log, so that no fault would come by itself."""
    sweep(machine)
    before = machine.statistics()
    assert before["blocks_2m"] >= 2
    Guest(machine).start_dirty_logging()
    sweep(machine)
    if harvested:
        Guest(machine).harvest()
        sweep(machine)
    during = machine.statistics()
    assert during["blocks_2m"] == before["blocks_2m"] - 2
    assert during["pages_4k"] >= WORK_PAGES
    Guest(machine).stop_dirty_logging()
    assert machine.statistics()["blocks_2m"] == during["blocks_2m"], "nothing is walked"
    sweep(machine)
    after = machine.statistics()
    for name in ("blocks_2m", "pages_4k", "tables"):
        assert after[name] == before[name], name
    assert after["blocks_rebuilt"] == before["blocks_rebuilt"] + 2


def test_blocks_come_back_after_logging_though_the_guest_runs_at_its_end(machine, monkeypatch) -> None:
    """Between the last look at the log and the end of logging there is time enough to write all pages."""
    sweep(machine)
    before = machine.statistics()["blocks_2m"]
    Guest(machine).start_dirty_logging()
    machine.cont()
    ram = machine.hardware.ram
    set_slot = ram._set_slot

    def set_late(flags: SlotFlags) -> None:
        if any(cpu.running for cpu in machine.hardware.vm.cpus):
            await_sweep(machine)
        set_slot(flags)

    monkeypatch.setattr(ram, "_set_slot", set_late)
    Guest(machine).stop_dirty_logging()
    machine.stop()
    sweep(machine)
    assert machine.statistics()["blocks_2m"] == before


def test_switching_twice_is_switching_once(machine) -> None:
    Guest(machine).stop_dirty_logging()
    with pytest.raises(HypervisorError):
        Guest(machine).harvest()
    Guest(machine).start_dirty_logging()
    sweep(machine)
    Guest(machine).start_dirty_logging()
    [batch] = Guest(machine).harvest()
    assert set(range(WORK_PAGE, WORK_PAGE + WORK_PAGES)) <= set(page_numbers(batch.words).tolist())
    Guest(machine).stop_dirty_logging()
    Guest(machine).stop_dirty_logging()
    with pytest.raises(HypervisorError):
        Guest(machine).harvest()


@pytest.mark.parametrize("initially_set", [False, True])
def test_a_log_begins_empty(initially_set: bool) -> None:
    """One that the hypervisor fills to begin with says nothing of what was written."""
    vm = EmulatedVm(1)
    with RamBlock("ram", 8 << 20) as block:
        if initially_set:
            vm.enable_manual_protect(ManualProtect.ENABLE | ManualProtect.INITIALLY_SET)
        ram = GuestRam(vm, block, Ipa(RAM_BASE), initially_set=initially_set)
        ram.write(RAM_BASE, b"before")
        for _ in range(2):
            ram.start_logging()
            ram.write(RAM_BASE + 5 * PAGE_SIZE - 1, b"xy")
            assert page_numbers(ram.harvest().words).tolist() == [4, 5]
            assert not ram.harvest().words.any()
            ram.write(RAM_BASE, b"left in the log")
            ram.stop_logging()
        vm.close()
        del ram
