import threading
import time

import pytest
from tests.hypervisor.programs import CODE, RAM, load

from sterna.hypervisor.interface import ExitReason, MemorySlot, SlotFlags
from sterna.memory.ram import RamBlock

LOG = SlotFlags.LOG_DIRTY_PAGES
TIMEOUT_S = 300


def wait_until(condition, what="the condition"):
    """Wait for a condition that other threads bring about."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true in {TIMEOUT_S} s"
        time.sleep(0)


class Guest:
    """A VM with one slot of RAM, its vCPUs each on a thread of its own."""

    def __init__(self, *, size=32 << 20, smp=1, **arguments):
        # Hosts where only KVM is tested have no emulated CPU.
        from sterna.hypervisor.emulated.vm import EmulatedVm

        self.block = RamBlock("ram", size)
        self.vm = EmulatedVm(smp, **arguments)
        # Its flushes would hide that one is missing elsewhere.
        self.vm.tlb_sizing.end()
        self.slot = MemorySlot(0, RAM, size, self.block)
        self.vm.set_memory_slot(self.slot)
        self.cpus = [self.vm.create_vcpu(i) for i in range(smp)]
        self.exits = {}
        self._threads = {}

    def program(self, words, cpu=0, at=CODE, **registers):
        """Load a program, and let a vCPU begin with it: r0=..., r1=..."""
        load(self.block, words, at)
        state = self.cpus[cpu].get_state()
        state.regs[15] = at
        state.powered_off = False
        for name, value in registers.items():
            state.regs[int(name[1:])] = value
        self.cpus[cpu].set_state(state)

    def start(self, *cpus):
        for cpu in cpus or range(len(self.cpus)):
            thread = threading.Thread(target=self._run, args=(cpu,), daemon=True)
            self._threads[cpu] = thread
            self.exits.pop(cpu, None)
            thread.start()

    def _run(self, cpu):
        try:
            self.exits[cpu] = self.cpus[cpu].run()
        except BaseException as error:
            self.exits[cpu] = error

    def finish(self, cpu=0):
        """The exit of a vCPU that stops of itself."""
        self._threads[cpu].join(TIMEOUT_S)
        assert not self._threads[cpu].is_alive(), "the vCPU goes on running"
        return self.exits[cpu]

    def stop(self):
        """Kick all vCPUs out."""
        for cpu, thread in self._threads.items():
            if thread.is_alive():
                self.cpus[cpu].kick()
                thread.join(TIMEOUT_S)
                assert not thread.is_alive(), "a kicked vCPU goes on running"

    def run(self, words, **registers):
        """Run a program on vCPU 0 to its end."""
        self.program(words, **registers)
        self.start(0)
        return self.finish(0)

    def log(self, on=True):
        flags = LOG if on else SlotFlags.NONE
        self.vm.set_memory_slot(MemorySlot(0, RAM, self.slot.size, self.block, flags=flags))

    def close(self):
        self.stop()
        self.vm.close()
        self.vm.stage2.validate()
        self.block.close()


@pytest.fixture
def make_guest():
    guests = []

    def make(**arguments):
        guests.append(Guest(**arguments))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.fixture(params=["broadcast", "generic"])
def guest(make_guest, request):
    """A guest under each form of the TLB flush."""
    return make_guest(generic_flush=request.param == "generic")


def powered_off(exit_):
    return exit_.reason is ExitReason.SYSTEM_EVENT
