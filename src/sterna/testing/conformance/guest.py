"""A small VM that the suite drives, whatever the hypervisor is."""

import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.hypervisor.interface import DirtyLogMode, Exit, ExitReason, MemorySlot, SlotFlags
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.memory.bitmap import page_numbers
from sterna.memory.ram import RamBlock
from sterna.testing.conformance.backends import (
    CODE,
    CODE_BYTES,
    LIST,
    RAM,
    RAM_BYTES,
    STOP,
    Backend,
    Program,
)

Variant = tuple[Backend, DirtyLogMode]
"""A hypervisor, and a way in which it keeps a log."""

TIMEOUT_S = 300
"""An arm64 host may be an emulated one."""
LOG = SlotFlags.LOG_DIRTY_PAGES
WORK = Ipa(0x8000_0000)
"""Where a guest's work slot is, unless a test puts it elsewhere."""
WORK_SLOT = 1
WORK_PAGES = 8 * 512 + 3
"""Not a multiple of 64: the last word of the bitmap is a partial one."""


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Wait for a condition that other threads bring about."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true in {TIMEOUT_S} s"
        time.sleep(0)


class _Stop:
    """The device that ends a program."""

    def __init__(self, guest: "ConformanceGuest") -> None:
        self._guest = guest

    def mmio_read(self, offset: int, size: int, cpu: int) -> int:
        return 0

    def mmio_write(self, offset: int, size: int, value: int, cpu: int) -> None:
        self._guest.stopped.add(cpu)
        self._guest.cpus[cpu].kick()


class ConformanceGuest:
    """A VM with RAM for programs in slot 0 and pages to work on in slot 1, its vCPUs each on a thread of its own.

    :ivar block: of the work slot
    :ivar stopped: the vCPUs whose programs have ended
    :ivar cpus: `Vcpu` of the hypervisor's own kind, whose state the back end knows
    :ivar exits: how each vCPU left the guest last, or what it raised

    :param pages: of the work slot
    :param offset: where it begins in its block
    :param options: what else the back end's `make_vm` takes
    """

    def __init__(
        self,
        backend: Backend,
        mode: DirtyLogMode,
        *,
        pages: int = WORK_PAGES,
        smp: int = 1,
        offset: int = 0,
        **options: Any,
    ) -> None:
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
        self.cpus: list[Any] = [self.vm.create_vcpu(index) for index in range(smp)]
        self.stopped: set[int] = set()
        self.exits: dict[int, Exit | BaseException] = {}
        self._threads: dict[int, threading.Thread] = {}
        backend.prepare(self.write)

    @property
    def words(self) -> NDArray[np.uint32]:
        """The first word of each page of the work slot, live: shape (pages,)."""
        return self.block.data[self.offset :].view(np.uint32).reshape(self.pages, -1)[:, 0]

    @property
    def ram(self) -> NDArray[np.uint8]:
        """The work slot's pages: shape (pages, 4096)."""
        return self.block.data[self.offset :].reshape(self.pages, PAGE_SIZE)

    def write(self, ipa: int, data: bytes) -> None:
        """Into slot 0, before the guest runs."""
        self.blocks[0].view[ipa - RAM : ipa - RAM + len(data)] = data

    # -- running -----------------------------------------------------------------------------------------------

    def start(self, program: Program | bytes, *parameters: int, cpu: int = 0) -> None:
        """Let a CPU begin with a program, one of the suite's or these instructions, on a thread of its own."""
        # Each program has a place of its own: a CPU may keep what it fetched from where there was another one.
        if isinstance(program, Program):
            place, code = list(Program).index(program), self.backend.code(program)
        else:
            place, code = len(Program), program
        entry = CODE + CODE_BYTES * place
        self.write(entry, code)
        self.backend.begin(self.cpus[cpu], entry, parameters)
        self.resume(cpu)

    def resume(self, cpu: int = 0) -> None:
        """Let a CPU that was stopped go on."""
        self.stopped.discard(cpu)
        self._threads[cpu] = threading.Thread(target=self._run, args=(cpu,), daemon=True)
        self._threads[cpu].start()

    def _run(self, cpu: int) -> None:
        try:
            self.exits[cpu] = self.cpus[cpu].run()
        except BaseException as error:
            self.exits[cpu] = error

    def join(self, cpu: int = 0) -> Exit:
        """The exit of a CPU that leaves of itself."""
        self._threads[cpu].join(TIMEOUT_S)
        assert not self._threads[cpu].is_alive(), "the vCPU goes on running"
        leaving = self.exits[cpu]
        if isinstance(leaving, BaseException):
            raise leaving
        return leaving

    def finish(self, cpu: int = 0) -> None:
        """Wait for a program's end."""
        leaving = self.join(cpu)
        assert leaving.reason is ExitReason.INTR, leaving.detail
        assert cpu in self.stopped

    def stop(self) -> None:
        """Take all CPUs out of the guest."""
        for cpu, thread in self._threads.items():
            if thread.is_alive():
                self.cpus[cpu].kick()
                leaving = self.join(cpu)
                assert leaving.reason is ExitReason.INTR, leaving.detail

    def wait_change(self, page: int) -> None:
        """Wait until a page's first word is another than it is now."""
        before = int(self.words[page])
        wait_until(lambda: self.words[page] != before, f"a write to page {page}")

    def touch(self, first: int, count: int, value: int = 1, cpu: int = 0) -> None:
        """Write `value` to `count` pages of the work slot from `first` on."""
        self.start(Program.TOUCH, self.slot.ipa + first * PAGE_SIZE, count, value, cpu=cpu)
        self.finish(cpu)

    def store(self, pages: Iterable[int], value: int = 1, cpu: int = 0) -> None:
        """Write `value` to these pages of the work slot, in this order."""
        self._list(Program.STORE_LIST, pages, value, cpu)

    def load(self, pages: Iterable[int], cpu: int = 0) -> None:
        """Read these pages of the work slot."""
        self._list(Program.LOAD_LIST, pages, 0, cpu)

    def _list(self, program: Program, pages: Iterable[int], value: int, cpu: int) -> None:
        addresses = [self.slot.ipa + page * PAGE_SIZE for page in pages]
        self.write(LIST, struct.pack(f"<{len(addresses)}I", *addresses))
        self.start(program, LIST, len(addresses), value, cpu=cpu)
        self.finish(cpu)

    # -- logging -----------------------------------------------------------------------------------------------

    def log(self, on: bool = True) -> None:
        """Switch the work slot's log. A log that starts full is taken once, as a machine does."""
        flags = self.slot.flags & ~LOG | (LOG if on else SlotFlags.NONE)
        if not on:
            self.vm.harvest_dirty_log(self.slot.slot)
        self.set_slot(flags=flags)
        if on and self.mode is DirtyLogMode.MANUAL:
            self.vm.harvest_dirty_log(self.slot.slot)

    def set_slot(self, **changes: Any) -> None:
        self.slot = replace(self.slot, **changes)
        self.vm.set_memory_slot(self.slot)

    def harvest(self) -> list[int]:
        """The pages written since the harvest before."""
        return [int(page) for page in page_numbers(self.vm.harvest_dirty_log(self.slot.slot))]

    def close(self) -> None:
        self.stop()
        self.vm.close()
        for block in self.blocks:
            block.close()


MakeGuest = Callable[..., ConformanceGuest]
"""Makes guests of one `Variant`; takes the other arguments of `ConformanceGuest`."""
