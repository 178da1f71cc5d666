"""Machines on the host's own CPU: x86_64 guests, their state, what stops them."""

import time
from pathlib import Path

import numpy as np
import pytest
from tests.machine.images import EM_X86_64, Elf64

from sterna.guests.check import check_ram
from sterna.guests.layout import DirtyramWord, RandomWord, StatusError, read_status_of_ram
from sterna.hypervisor.interface import DirtyLogMode
from sterna.machine.config import ConfigError, MachineConfig
from sterna.machine.loader import LoadError
from sterna.machine.migratable import MigratableMachine as Guest
from sterna.machine.runstate import RunState
from sterna.memory.address import PAGE_SIZE
from sterna.memory.bitmap import page_numbers
from sterna.ownership import Event
from sterna.stream.vmstate import DeviceState, StreamError
from sterna.testing.conformance.backends import KvmX86

pytestmark = pytest.mark.kvm

TIMEOUT_S = 300
CODE = 0x4020_1000


@pytest.fixture(autouse=True)
def _x86_kvm():
    if why := KvmX86().missing():
        pytest.skip(why)


@pytest.fixture
def make(make_machine):
    def make(**settings):
        return make_machine(accel="kvm", **settings)

    return make


def wait_for(machine, condition):
    """The first status of the running guest that meets `condition`."""
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            status = read_status_of_ram(machine.ram_blocks[0].data)
            if status.steps() and condition(status):
                return status
        except StatusError:
            pass  # it has not come that far
        assert machine.run_state is RunState.RUNNING, machine.error
        assert time.monotonic() < end, bytes(machine.serial.output)
        time.sleep(0.001)


def problems(machine):
    """What is wrong with a stopped machine's memory."""
    assert machine.error is None
    return check_ram(machine.ram_blocks[0].data)


MIGRATION = bytes(range(16))


def move(source, destination, elapsed_ns=0):
    """Migrate by hand: RAM and devices, through the bytes of their sections."""
    Guest(source).stop_for_migration()
    destination.ram_blocks[0].data[:] = source.ram_blocks[0].data
    sections = []
    for state in Guest(source).save_devices():
        description = Guest(source).descriptions[state.name]
        sections.append(description.decode(description.encode(state), instance_id=state.instance_id))
    Guest(destination).load_devices(sections)
    source.ownership.apply(Event.COMMIT_SENT, MIGRATION)
    destination.ownership.apply(Event.TAKEN_OVER, MIGRATION)
    Guest(destination).advance_counter(elapsed_ns)
    source.ownership.apply(Event.RUNS, MIGRATION)
    Guest(source).migrated_away()
    Guest(destination).resume()


def test_it_is_the_default_machine_of_this_accelerator(make):
    machine = make(kernel="clock")
    assert machine.config.machine == Guest(machine).machine_type == "pc-min"
    assert machine.config.cpu == "host"
    assert machine.run_state is RunState.PRELAUNCH
    assert machine.read_physical(0x4000_0000, 4) == b"\xd0\x0d\xfe\xed", "the device tree"
    assert f"RIP   ={CODE:016x}" in machine.registers(0)


@pytest.mark.parametrize("smp", [1, 2, 4])
@pytest.mark.parametrize("mode", list(DirtyLogMode))
def test_shipped_guests_run_and_are_logged(make, smp, mode):
    machine = make(kernel="dirtyram", append="512 64 1", smp=smp, dirty_log=mode)
    machine.cont()
    wait_for(machine, lambda s: all(s.word(cpu, DirtyramWord.PASSES) for cpu in range(smp)))
    Guest(machine).start_dirty_logging()
    status = wait_for(machine, lambda s: True)
    writes = [status.word(cpu, DirtyramWord.WRITES) for cpu in range(smp)]
    wait_for(
        machine, lambda s: all(s.word(cpu, DirtyramWord.WRITES) > writes[cpu] + 200 for cpu in range(smp))
    )
    dirty = set()
    [batch] = Guest(machine).harvest()
    dirty |= set(page_numbers(batch.words).tolist())
    machine.stop()
    [batch] = Guest(machine).harvest()
    dirty |= set(page_numbers(batch.words).tolist())
    Guest(machine).stop_dirty_logging()
    assert problems(machine) == []
    work = range(1024, 1024 + 512)
    assert 512 in dirty, "the status page"
    assert len(dirty & set(work)) > 100
    assert all(page < 1024 or page in work for page in dirty)


def test_a_guest_moves_with_all_its_registers(make):
    """`random` keeps values in all vector registers, and checks them."""
    chain = [make(kernel="random", append="7 600", smp=2, serial="memory")]
    chain[0].cont()
    for _ in range(3):
        there = make(smp=2, incoming=True)
        steps = [wait_for(chain[-1], lambda s: True).word(cpu, RandomWord.STEPS) for cpu in (0, 1)]
        wait_for(
            chain[-1],
            lambda s, steps=steps: all(s.word(cpu, RandomWord.STEPS) > steps[cpu] for cpu in (0, 1)),
        )
        move(chain[-1], there)
        assert chain[-1].run_state is RunState.POSTMIGRATE
        chain.append(there)
    before = read_status_of_ram(chain[-1].ram_blocks[0].data)
    wait_for(chain[-1], lambda s: s.steps() > before.steps() + 20)
    chain[-1].stop()
    assert problems(chain[-1]) == []
    assert read_status_of_ram(chain[-1].ram_blocks[0].data).backward_steps() == 0


def test_the_clock_stands_still_while_paused_and_jumps_with_a_migration(make):
    here, there = make(kernel="clock", append="10"), make(incoming=True)
    here.cont()
    wait_for(here, lambda s: True)
    here.stop()
    stopped = here.stopped_counter
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    before = int(read_status_of_ram(here.ram_blocks[0].data).cpu(0)["last_counter"])
    began = time.monotonic_ns()
    here.cont()
    gone = here.hardware.vm.counter() - stopped
    assert 0 <= gone <= time.monotonic_ns() - began + 1_000_000, "from where it stood"
    wait_for(here, lambda s: int(s.cpu(0)["last_counter"]) > before)
    hour = 3600 * 10**9
    move(here, there, elapsed_ns=hour)
    last = int(read_status_of_ram(here.ram_blocks[0].data).cpu(0)["last_counter"])
    status = wait_for(there, lambda s: int(s.cpu(0)["last_counter"]) > last + hour)
    assert int(status.cpu(0)["last_counter"]) < last + hour + TIMEOUT_S * 10**9
    assert status.backward_steps() == 0


def test_throttled_guests_do_less(make):
    machine = make(kernel="dirtyram", append="4000 2000 0", smp=2)
    machine.cont()
    wait_for(machine, lambda s: all(s.word(cpu, DirtyramWord.PASSES) for cpu in (0, 1)))

    def ran_ns():
        """For how long the vCPUs had a processor: what they wrote depends on what else the machine does."""
        tasks = [Path(f"/proc/self/task/{cpu.thread_id}/schedstat") for cpu in machine.cpus()]
        return sum(int(task.read_text().split()[0]) for task in tasks)

    Guest(machine).throttle(95)
    began, before = time.monotonic_ns(), ran_ns()
    end = time.monotonic() + TIMEOUT_S
    while (passed := time.monotonic_ns() - began) < 10**9 or (ran_ns() - before) / passed / 2 >= 0.3:
        # On a busy machine it may come late to hold them; sooner or later that is made up for.
        assert time.monotonic() < end
        time.sleep(0.01)
    Guest(machine).throttle(0)
    steps = read_status_of_ram(machine.ram_blocks[0].data).steps()
    wait_for(machine, lambda s: s.steps() > steps)
    machine.stop()
    assert problems(machine) == []


def kernel(tmp_path, code):
    path = tmp_path / "kernel.elf"
    path.write_bytes(Elf64(CODE, ((CODE, code, len(code)),)).build())
    return str(path)


def wait_end(machine):
    end = time.monotonic() + TIMEOUT_S
    while machine.run_state is RunState.RUNNING:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("48c7c3efbeadde 0f0b", "the CPU shut down (triple fault), rip 0x40201007"),  # mov rbx, ...; ud2
        (
            "8b042500000010",
            "access outside memory at IPA 0x10000000, rip 0x40201000",
        ),  # mov eax, [0x10000000]
        ("f4", "the CPU shut down (triple fault), rip 0x40201000"),  # hlt
    ],
)
def test_a_guest_that_breaks_is_reported_with_its_registers(make, tmp_path, code, message):
    machine = make(kernel=kernel(tmp_path, bytes.fromhex(code)))
    machine.cont()
    wait_end(machine)
    assert machine.run_state is RunState.INTERNAL_ERROR
    first, *registers = machine.error.splitlines()
    assert first == f"vCPU 0: {message}"
    assert any("RIP" in line for line in registers)
    assert any("CR3=40100000" in line for line in registers)
    if "dead" in code:
        assert "RBX   =ffffffffdeadbeef" in machine.error
    assert machine.registers(0)


def test_kernels_of_other_machines_are_refused(make, make_kernel, tmp_path):
    with pytest.raises(LoadError, match="32-bit ELF file, a pc-min guest is 64-bit"):
        make(kernel=make_kernel([0]))
    path = tmp_path / "arm64.elf"
    path.write_bytes(Elf64(CODE, ((CODE, b"\0" * 4, 4),), machine=183).build())
    with pytest.raises(LoadError, match="EM_AARCH64, a pc-min guest is EM_X86_64"):
        make(kernel=str(path))
    low = 0x4010_0000
    path.write_bytes(Elf64(low, ((low, b"\0" * 4, 4),), machine=EM_X86_64).build())
    with pytest.raises(LoadError, match="0x40106100"):
        make(kernel=str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpu": "cortex-a15"}, "choose host"),
        ({"memory_bytes": 3 << 30}, "at most 2816 MiB"),
        ({"dirty_log": "tape"}, "choose bitmap or manual or ring"),
        ({"dirty_log": "ring", "accel": "emulated"}, "no dirty rings"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MachineConfig(**({"accel": "kvm"} | settings))


def test_sections_that_do_not_fit(make):
    source = make(kernel="clock", smp=2)
    Guest(source).stop_for_migration()
    states = Guest(source).save_devices()
    assert {state.name for state in states} == {"timer", "x86-cpu", "pl011", "globalstate"}
    cpu = next(state for state in states if state.name == "x86-cpu")

    def changed(**fields):
        return [
            DeviceState(s.name, s.instance_id, s.version, s.fields | fields, s.subsections) if s is cpu else s
            for s in states
        ]

    numbers = cpu.fields["msr_numbers"]
    for wrong, message in (
        (states[:-2], "pl011"),
        ([*states, states[0]], "twice"),
        (changed(msr_numbers=[numbers[0], *numbers[:-1]]), "a register comes twice"),
        (
            changed(cpuid_ebx=[0xFFFF_FFFF] * len(cpu.fields["cpuid_ebx"])),
            "this host has another CPU: CPUID 0x0 EBX",
        ),
        (changed(cr4=1 << 60), "KVM_SET_SREGS"),
    ):
        destination = make(smp=2, incoming=True)
        with pytest.raises(StreamError, match=message):
            Guest(destination).load_devices(wrong)
        Guest(destination).load_devices(states)
    with pytest.raises(StreamError, match="set smp to match"):
        Guest(make(incoming=True)).load_devices(states)


def test_host_writes_reach_the_log(make):
    machine = make(kernel="clock", memory_bytes=16 << 20)
    Guest(machine).start_dirty_logging()
    machine.hardware.ram.write(0x4000_0000 + 5 * PAGE_SIZE - 2, b"1234")
    [batch] = Guest(machine).harvest()
    assert page_numbers(batch.words).tolist() == [4, 5]
    assert not np.any(Guest(machine).harvest()[0].words)
