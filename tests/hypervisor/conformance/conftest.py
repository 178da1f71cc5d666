import struct
import threading
import time

import numpy as np
import pytest
from tests.hypervisor.conformance.backends import (
    BACKENDS,
    CODE,
    CODE_BYTES,
    LIST,
    RAM,
    RAM_BYTES,
    STOP,
    Backend,
    Program,
)

from sterna.hypervisor.interface import DirtyLogMode, ExitReason, MemorySlot, SlotFlags
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.memory.bitmap import page_numbers
from sterna.memory.ram import RamBlock

TIMEOUT_S = 300
"""An arm64 host may be an emulated one."""
LOG = SlotFlags.LOG_DIRTY_PAGES
WORK = Ipa(0x8000_0000)
"""Where a guest's work slot is, unless a test puts it elsewhere."""
WORK_SLOT = 1
WORK_PAGES = 8 * 512 + 3
"""Not a multiple of 64: the last word of the bitmap is a partial one."""


def wait_until(condition, what="the condition"):
    """Wait for a condition that other threads bring about."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true in {TIMEOUT_S} s"
        time.sleep(0)


class _Stop:
    """The device that ends a program."""

    def __init__(self, guest):
        self._guest = guest

    def mmio_read(self, offset, size, cpu):
        return 0

    def mmio_write(self, offset, size, value, cpu):
        self._guest.stopped.add(cpu)
        self._guest.cpus[cpu].kick()


class Guest:
    """A VM with RAM for programs in slot 0 and pages to work on in slot 1."""

    def __init__(self, backend: Backend, mode: DirtyLogMode, *, pages=WORK_PAGES, smp=1, offset=0, **options):
        self.backend, self.mode = backend, mode
        self.pages = pages
        self.vm = backend.make_vm(smp, mode, **options)
        self.blocks = [RamBlock("programs", RAM_BYTES), RamBlock("work", pages * PAGE_SIZE + offset)]
        self.block = self.blocks[1]
        self.offset = offset
        self.vm.set_memory_slot(MemorySlot(0, RAM, RAM_BYTES, self.blocks[0]))
        self.slot = MemorySlot(WORK_SLOT, WORK, pages * PAGE_SIZE, self.block, offset)
        self.vm.set_memory_slot(self.slot)
        self.vm.add_mmio(STOP, PAGE_SIZE, _Stop(self))
        self.cpus = [self.vm.create_vcpu(index) for index in range(smp)]
        self.stopped = set()
        self.exits = {}
        self._threads = {}
        backend.prepare(self.write)

    @property
    def words(self):
        """The first word of each page of the work slot, live: shape (pages,)."""
        return self.block.data[self.offset :].view(np.uint32).reshape(self.pages, -1)[:, 0]

    @property
    def ram(self):
        """The work slot's pages: shape (pages, 4096)."""
        return self.block.data[self.offset :].reshape(self.pages, PAGE_SIZE)

    def write(self, ipa, data):
        """Into slot 0, before the guest runs."""
        self.blocks[0].view[ipa - RAM : ipa - RAM + len(data)] = data

    # -- running -----------------------------------------------------------------------------------------------

    def start(self, program: Program, *parameters, cpu=0):
        """Let a CPU begin with a program, on a thread of its own."""
        # Each program has a place of its own: a CPU may keep what it fetched from where there was another one.
        entry = CODE + CODE_BYTES * list(Program).index(program)
        self.write(entry, self.backend.code(program))
        self.backend.begin(self.cpus[cpu], entry, parameters)
        self.resume(cpu)

    def resume(self, cpu=0):
        """Let a CPU that was stopped go on."""
        self.stopped.discard(cpu)
        self._threads[cpu] = threading.Thread(target=self._run, args=(cpu,), daemon=True)
        self._threads[cpu].start()

    def _run(self, cpu):
        try:
            self.exits[cpu] = self.cpus[cpu].run()
        except BaseException as error:
            self.exits[cpu] = error

    def join(self, cpu=0):
        """The exit of a CPU that leaves of itself."""
        self._threads[cpu].join(TIMEOUT_S)
        assert not self._threads[cpu].is_alive(), "the vCPU goes on running"
        if isinstance(self.exits[cpu], BaseException):
            raise self.exits[cpu]
        return self.exits[cpu]

    def finish(self, cpu=0):
        """Wait for a program's end."""
        leaving = self.join(cpu)
        assert leaving.reason is ExitReason.INTR, leaving.detail
        assert cpu in self.stopped

    def stop(self):
        """Take all CPUs out of the guest."""
        for cpu, thread in self._threads.items():
            if thread.is_alive():
                self.cpus[cpu].kick()
                assert self.join(cpu).reason is ExitReason.INTR, self.exits[cpu].detail

    def touch(self, first, count, value=1, cpu=0):
        """Write `value` to `count` pages of the work slot from `first` on."""
        self.start(Program.TOUCH, self.slot.ipa + first * PAGE_SIZE, count, value, cpu=cpu)
        self.finish(cpu)

    def store(self, pages, value=1, cpu=0):
        """Write `value` to these pages of the work slot, in this order."""
        self._list(Program.STORE_LIST, pages, value, cpu)

    def load(self, pages, cpu=0):
        """Read these pages of the work slot."""
        self._list(Program.LOAD_LIST, pages, 0, cpu)

    def _list(self, program, pages, value, cpu):
        addresses = [self.slot.ipa + page * PAGE_SIZE for page in pages]
        self.write(LIST, struct.pack(f"<{len(addresses)}I", *addresses))
        self.start(program, LIST, len(addresses), value, cpu=cpu)
        self.finish(cpu)

    # -- logging -----------------------------------------------------------------------------------------------

    def log(self, on=True):
        """Switch the work slot's log. A log that starts full is taken once, as a machine does."""
        flags = self.slot.flags & ~LOG | (LOG if on else SlotFlags.NONE)
        if not on:
            self.vm.harvest_dirty_log(self.slot.slot)
        self.set_slot(flags=flags)
        if on and self.mode is DirtyLogMode.MANUAL:
            self.vm.harvest_dirty_log(self.slot.slot)

    def set_slot(self, **changes):
        slot = self.slot
        fields = {name: getattr(slot, name) for name in ("slot", "ipa", "size", "block", "offset", "flags")}
        self.slot = MemorySlot(**fields | changes)
        self.vm.set_memory_slot(self.slot)

    def harvest(self):
        """The pages written since the harvest before."""
        return [int(page) for page in page_numbers(self.vm.harvest_dirty_log(self.slot.slot))]

    def close(self):
        self.stop()
        self.vm.close()
        for block in self.blocks:
            block.close()


def pytest_generate_tests(metafunc):
    """A test that uses `variant`, as `make_guest` does, comes once for each hypervisor and way to keep a log."""
    if "variant" in metafunc.fixturenames:
        combinations = [(backend, mode) for backend in BACKENDS for mode in backend.modes]
        metafunc.parametrize("variant", combinations, ids=[f"{b.name}-{mode}" for b, mode in combinations])


@pytest.fixture
def make_guest(variant):
    backend, mode = variant
    if why := backend.missing():
        pytest.skip(why)
    guests = []

    def make(**arguments):
        guests.append(Guest(backend, mode, **arguments))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.fixture
def guest(make_guest):
    return make_guest()
