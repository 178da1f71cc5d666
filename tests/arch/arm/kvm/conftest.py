"""VMs of this host's KVM, where it is an arm64 host: `sterna testbed host arm64` is one."""

import platform
import threading

import pytest
from tests.hypervisor.programs import CODE, RAM, load

from sterna.arch.armv7.kvm import Armv7KvmVm
from sterna.hypervisor.interface import HypervisorError, MemorySlot
from sterna.hypervisor.kvm.system import Capability, System
from sterna.memory.ram import RamBlock

TIMEOUT_S = 300
"""The host may be an emulated one."""


class Armv7Guest:
    """A VM for ARMv7 programs with one slot of RAM, its vCPUs each on a thread of its own."""

    def __init__(self, size=16 << 20, smp=1, **settings):
        self.block = RamBlock("ram", size)
        self.vm = Armv7KvmVm(smp, **settings)
        self.vm.set_memory_slot(MemorySlot(0, RAM, size, self.block))
        self.cpus = [self.vm.create_vcpu(index) for index in range(smp)]
        self._exits = {}
        self._threads = {}

    def start(self, words, cpu=0, **registers):
        """Let a vCPU run a program: r0=..., r1=..."""
        load(self.block, words, CODE)
        state = self.cpus[cpu].get_state()
        state.regs[15], state.cpsr, state.powered_off = CODE, 0x1D3, False
        for name, value in registers.items():
            state.regs[int(name[1:])] = value
        self.cpus[cpu].set_state(state)
        self.resume(cpu)

    def resume(self, cpu=0):
        """Let it go on."""

        def run():
            self._exits[cpu] = self.cpus[cpu].run()

        self._threads[cpu] = threading.Thread(target=run, daemon=True)
        self._threads[cpu].start()

    def running(self, cpu=0):
        return self._threads[cpu].is_alive()

    def finish(self, cpu=0):
        """The exit of a vCPU that stops of itself."""
        self._threads[cpu].join(TIMEOUT_S)
        assert not self.running(cpu), "the vCPU goes on running"
        return self._exits[cpu]

    def run(self, words, **registers):
        """Run a program on vCPU 0 to its end."""
        self.start(words, **registers)
        return self.finish()

    def stop(self):
        """Kick all vCPUs out."""
        for cpu, thread in self._threads.items():
            if thread.is_alive():
                self.cpus[cpu].kick()
                self.finish(cpu)

    def close(self):
        self.stop()
        self.vm.close()
        self.block.close()


@pytest.fixture
def kvm():
    """Skips where there is none."""
    if platform.machine() != "aarch64":
        pytest.skip(f"needs the KVM of an arm64 host; this one is {platform.machine()}")
    try:
        system = System()
    except HypervisorError as error:
        pytest.skip(f"no KVM: {error}")
    with system:
        yield system


@pytest.fixture
def make_guest(kvm):
    """Makes ARMv7 guests, and closes them."""
    if not kvm.check(Capability.ARM_EL1_32BIT):
        pytest.skip("this host's CPUs have no 32-bit guests")
    guests = []

    def make(**settings):
        guests.append(Armv7Guest(**settings))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()
