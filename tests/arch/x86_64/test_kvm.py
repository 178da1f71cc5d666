"""The state of an x86_64 vCPU, and what its guest may rely on."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sterna
from sterna.arch.x86_64.kvm import traits
from sterna.arch.x86_64.state import MSR_KVM_SYSTEM_TIME, MSR_TSC
from sterna.hypervisor.interface import DirtyLogMode, ExitReason, HypervisorError
from sterna.hypervisor.traits import Rule, Trait, first_difference
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.testing.conformance.backends import CELL, CODE, NOWHERE, RAM, Program
from sterna.testing.conformance.guest import WORK, wait_until

# movq xmm15, rdi; mov rax, rsi; mov [r9], edx; inc rax; jmp .
SET = "664c0f6eff 4889f0 418911 48ffc0 ebfe"


def same(state):
    """A state without what goes on by itself."""
    return dataclasses.replace(state, msrs={n: v for n, v in state.msrs.items() if n != MSR_TSC})


def test_a_state_goes_from_one_vcpu_to_another(make_guest):
    here, there = make_guest(), make_guest()
    here.write(CODE, bytes.fromhex(SET))
    here.backend.begin(here.cpus[0], CODE, (0x1122_3344_5566_7788, 42, 7))
    state = here.cpus[0].get_state()
    state.debug[0] = 0x1234_5000
    state.control["cr2"] = 0xDEAD_B000
    state.msrs[0xC000_0081] = 0x0023_0010_0000_0000  # STAR
    here.cpus[0].set_state(state)
    assert here.cpus[0].run().reason is ExitReason.INTR
    state = here.cpus[0].get_state()
    # The store to the device is done, the instruction behind it may be.
    assert state.regs["rip"] > CODE + 8
    assert state.regs["rax"] in (42, 43)
    assert (0x1122_3344_5566_7788).to_bytes(8, "little") in state.xsave
    there.cpus[0].set_state(state)
    assert same(there.cpus[0].get_state()) == same(state)
    assert there.cpus[0].get_state().debug[0] == 0x1234_5000


def test_a_read_from_a_device_is_done_before_the_state_is_taken(make_guest):
    """KVM keeps the value for the next KVM_RUN; a state without it would lose it."""
    guest = make_guest()

    class Device:
        def mmio_read(self, offset, size, cpu):
            guest.cpus[0].kick()
            return 0x1234_5678

    guest.vm.add_mmio(Ipa(0x0B00_0000), PAGE_SIZE, Device())
    guest.write(CODE, bytes.fromhex("8b07 ebfe"))  # mov eax, [rdi]; jmp .
    guest.backend.begin(guest.cpus[0], CODE, (0x0B00_0000,))
    assert guest.cpus[0].run().reason is ExitReason.INTR
    state = guest.cpus[0].get_state()
    assert state.regs["rax"] == 0x1234_5678
    assert state.regs["rip"] == CODE + 2


def test_cr8_outlives_the_first_run(make_guest):
    """Without a local APIC in the kernel, KVM_RUN takes it from the page that is shared (api.rst, 5)."""
    guest = make_guest()
    guest.write(CODE, guest.backend.code(Program.TOUCH))
    guest.backend.begin(guest.cpus[0], CODE, (WORK, 1, 1))
    state = guest.cpus[0].get_state()
    state.control["cr8"] = 5
    guest.cpus[0].set_state(state)
    assert guest.cpus[0].get_state().control["cr8"] == 5
    assert guest.cpus[0].run().reason is ExitReason.INTR
    assert guest.words[0] == 1
    assert guest.cpus[0].get_state().control["cr8"] == 5


@pytest.mark.parametrize("get_between", [False, True])
def test_an_access_of_two_pages_is_given_up_as_a_whole(make_guest, get_between):
    """KVM asks for its parts one after the other; the first is refused."""
    guest = make_guest()
    guest.start(Program.SPIN)
    guest.stop()
    cpu = guest.cpus[0]
    state = cpu.get_state()
    guest.write(CODE, bytes.fromhex("488b07 ebfe"))  # mov rax, [rdi]; jmp .
    guest.backend.begin(cpu, CODE, (NOWHERE + PAGE_SIZE - 4,))
    assert "access outside memory at IPA 0x20000ffc" in cpu.run().detail
    if get_between:
        assert cpu.get_state().regs["rip"] == CODE + 3
    cpu.set_state(state)
    cpu.kick()
    assert cpu.run().reason is ExitReason.INTR
    after = cpu.get_state()
    assert (after.regs, after.segments, after.control) == (state.regs, state.segments, state.control)


def test_the_clock_is_the_guests_counter(make_guest):
    guest = make_guest()
    vm = guest.vm
    vm.set_counter(5_000_000_000)
    start = time.monotonic_ns()
    first = vm.counter()
    assert 5_000_000_000 <= first < 15_000_000_000
    wait_until(lambda: vm.counter() - first > 20_000_000, "20 ms")
    passed = vm.counter() - first
    end = time.monotonic_ns()
    assert passed <= (end - start) * 1.01 + 10_000_000
    # The guest's record of it follows when it runs.
    record = RAM + 0x5000
    guest.write(CODE, guest.backend.code(Program.TOUCH))
    guest.backend.begin(guest.cpus[0], CODE, (WORK, 1, 1))
    state = guest.cpus[0].get_state()
    state.msrs[MSR_KVM_SYSTEM_TIME] = record | 1
    guest.cpus[0].set_state(state)
    vm.set_counter(77_000_000_000)
    guest.cpus[0].run()
    at = record - RAM + 16
    shown = int.from_bytes(guest.blocks[0].view[at : at + 8], "little")
    assert 77_000_000_000 <= shown <= vm.counter()


@pytest.mark.parametrize("ns", [3600 * 10**9, (1 << 64) - 1], ids=["an hour", "for ever"])
def test_a_sleeping_vcpu_wakes_and_can_be_kicked(make_guest, ns):
    guest = make_guest()

    class Sleep:
        def mmio_write(self, offset, size, value, cpu):
            guest.cpus[cpu].sleep(value)

    guest.vm.add_mmio(Ipa(0x0B00_0000), PAGE_SIZE, Sleep())
    # again: mov [rdi], rsi; inc dword [rdx]; jmp again
    guest.write(CODE, bytes.fromhex("488937 ff02 ebf9"))
    cell = lambda: int.from_bytes(guest.blocks[0].view[CELL - RAM : CELL - RAM + 4], "little")  # noqa: E731
    guest.backend.begin(guest.cpus[0], CODE, (0x0B00_0000, ns, CELL))
    guest.resume()
    for count in range(1, 5):
        wait_until(lambda: not guest.cpus[0]._in_guest, "sleep")
        guest.cpus[0].wake()
        wait_until(lambda count=count: cell() >= count, "the next round")
    guest.stop()
    guest.backend.begin(guest.cpus[0], CODE, (0x0B00_0000, 1000, CELL))
    guest.resume()
    wait_until(lambda: cell() > 20, "short sleeps")
    guest.stop()


def test_statistics_of_the_kernel(make_guest):
    guest = make_guest()
    guest.touch(0, 1000)
    numbers = guest.vm.statistics()
    assert {"pages_4k", "blocks_2m", "blocks_1g", "flushes", "vcpu_exits"} <= set(numbers)
    assert numbers["vcpu_exits"] >= 1
    assert numbers["vcpu_mmio_exits"] >= 1


def test_states_that_this_host_cannot_have(make_guest):
    guest = make_guest()
    cpu = guest.cpus[0]
    good = cpu.get_state()
    leaf = next(leaf for leaf in good.cpuid if leaf.function == 7 and leaf.index == 0)
    lacking = dataclasses.replace(leaf, ebx=0xFFFF_FFFF)
    cases = (
        (
            {"cpuid": [lacking if entry is leaf else entry for entry in good.cpuid]},
            r"CPUID 0x7 EBX: it lacks bits",
        ),
        ({"msrs": good.msrs | {0xC0FF_EE00: 1}}, r"MSR 0xc0ffee00 cannot be set to 0x1 .*does not exist"),
        ({"xcrs": {0: 1 << 40}}, "KVM_SET_XCRS"),
        ({"xcrs": dict.fromkeys(range(17), 1)}, "17 extended control registers"),
        ({"xsave": good.xsave + b"\1"}, "XSAVE area of"),
        ({"control": good.control | {"cr4": 1 << 60}}, "KVM_SET_SREGS"),
    )
    for changes, message in cases:
        with pytest.raises(HypervisorError, match=message):
            cpu.set_state(dataclasses.replace(good, **changes))
    cpu.set_state(good)
    guest.touch(0, 5)


def test_traits_name_the_first_difference():
    guest = [
        Trait("vendor", Rule.EQUAL, 5),
        Trait("features", Rule.BITS, 0b110),
        Trait("bytes", Rule.AT_LEAST, 100),
        Trait("kHz", Rule.CLOSE, 2_000_000),
    ]
    host = {"vendor": 5, "features": 0b1110, "bytes": 4096, "kHz": 2_000_400}
    assert first_difference(guest, host) is None
    assert first_difference(guest, host | {"kHz": 0}) is None
    for changes, message in (
        ({"vendor": 6}, "vendor: it has 0x6, the guest has 0x5"),
        ({"features": 0b1010}, "features: it lacks bits 0x4"),
        ({"bytes": 99}, "bytes: it has 99, the guest has 100"),
        ({"kHz": 2_001_000}, "kHz: it has 2001000, the guest has 2000000"),
        ({"kHz": 1_999_000}, "kHz: it has 1999000"),
    ):
        assert first_difference(guest, host | changes).startswith(message)
    assert first_difference(guest, {}) == "it has no vendor"


def test_a_guest_can_run_where_it_runs(make_guest):
    vm = make_guest(smp=2).vm
    assert first_difference(vm.guest_traits(), vm.host_traits()) is None
    assert len(vm.guest_traits()) > 20
    other = make_guest().vm
    assert first_difference(vm.guest_traits(), other.host_traits()) is None
    # A host without SSE2 (CPUID 1, EDX, bit 26).
    lesser = [
        dataclasses.replace(leaf, edx=leaf.edx & ~(1 << 26)) if leaf.function == 1 else leaf
        for leaf in vm.cpuid
    ]
    host = {trait.name: trait.value for trait in traits.of_cpuid(lesser)}
    assert first_difference(traits.of_cpuid(vm.cpuid), host) == "CPUID 0x1 EDX: it lacks bits 0x4000000"


def test_neither_numba_nor_unicorn_is_needed(x86):
    code = """
import sys
sys.modules["numba"] = sys.modules["unicorn"] = sys.modules["llvmlite"] = None
import time
from sterna.guests.layout import STATUS_BYTES, STATUS_OFFSET, StatusError, read_status
from sterna.machine.config import MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine
with Machine(MachineConfig(accel="kvm", kernel="dirtyram", append="64 16 1", memory_bytes=16 << 20)) as machine:
    machine.cont()
    guest = MigratableMachine(machine)
    guest.start_dirty_logging()
    dirty, deadline = 0, time.monotonic() + 300
    while dirty < 64 and time.monotonic() < deadline:
        dirty += sum(batch.pages for batch in guest.harvest())
    guest.stop_dirty_logging()
    machine.stop()
    assert machine.error is None, machine.error
    assert dirty >= 64
print("ran")
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(Path(sterna.__file__).parent.parent)},
        check=False,
    )
    assert result.stdout == "ran\n", result.stderr


@pytest.mark.parametrize("mode", list(DirtyLogMode))
def test_a_machine_of_each_mode_can_be_thrown_away_while_it_logs(make_guest, mode):
    guest = make_guest(mode)
    guest.log()
    guest.touch(0, 100)
