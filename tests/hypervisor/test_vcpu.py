"""vCPUs: exits and their reports, kicks, wfi, PSCI, devices, state, time."""

import copy
import time

import pytest
from tests.hypervisor.conftest import powered_off, wait_until
from tests.hypervisor.programs import (
    CODE,
    CPU_ON,
    ENABLE_VFP,
    JUMP,
    LOAD,
    LOAD_DOUBLE,
    OUTPUT,
    POWER_OFF,
    RAM,
    SET_REGISTERS,
    SLEEP,
    SPIN,
    STORE,
    STORE_CONTEXT,
    SVC,
    UNDEFINED,
    WFE_LOOP,
    WFE_UNDEFINED,
    WFI,
    load,
    word,
)

from sterna.arch.arm import psci
from sterna.arch.arm.psci import Function, Result
from sterna.arch.arm.timer import COUNTER_HZ
from sterna.arch.armv7 import stage2 as armv7
from sterna.arch.armv7.cp15 import (
    CNTV_CVAL,
    CPACR,
    DFAR,
    SCTLR,
    TPIDRPRW,
    TPIDRURO,
    TPIDRURW,
    TTBR0,
    VBAR,
)
from sterna.hypervisor.interface import Exit, ExitReason, HypervisorError, MemorySlot, SystemEvent
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.memory.ram import RamBlock

UART = Ipa(0x0900_0000)


class Register:
    """A device of one register."""

    def __init__(self):
        self.value = 0x1234
        self.accesses = []

    def mmio_read(self, offset, size, cpu):
        self.accesses.append(("read", offset, size, cpu))
        return self.value

    def mmio_write(self, offset, size, value, cpu):
        self.accesses.append(("write", offset, size, value, cpu))


class Broken(Register):
    def mmio_read(self, offset, size, cpu):
        raise ValueError("the device is broken")


@pytest.fixture
def guest(make_guest):
    return make_guest()


@pytest.mark.parametrize(
    ("program", "registers", "parts"),
    [
        (UNDEFINED, {}, ["undefined instruction 0xe7f000f0", f"pc {CODE:#010x}"]),
        (WFE_UNDEFINED, {}, ["undefined instruction 0xe7f000f0", f"pc {CODE + 4:#010x}"]),
        (
            LOAD,
            {"r0": 0x3000_0000},
            ["access outside memory", "translation fault", "0x30000000", f"pc {CODE:#010x}"],
        ),
        (STORE, {"r0": 0x3000_0000}, ["access outside memory", "0x30000000"]),
        (JUMP, {"r0": 0x3000_0000}, ["instruction fetch outside memory", "0x30000000"]),
        (JUMP, {"r0": 0}, ["instruction fetch outside memory", "IPA 0x0"]),
        (JUMP, {"r0": UART}, ["instruction fetch", f"{UART:#x}"]),
        (SVC, {}, ["supervisor call"]),
    ],
)
def test_impossible_guests_stop_with_a_report(guest, program, registers, parts):
    guest.vm.add_mmio(UART, 4096, Register())
    report = guest.run(program, **registers)
    assert report.reason is ExitReason.INTERNAL_ERROR
    for part in parts:
        assert part in report.detail
    assert "vCPU 0" in report.detail


def test_power_off(guest):
    report = guest.run(LOAD, r0=RAM)
    assert powered_off(report)
    assert report.event is SystemEvent.SHUTDOWN


def test_kick_ends_a_busy_loop_soon(guest):
    guest.program(SPIN)
    times = []
    for _ in range(20):
        guest.start()
        wait_until(lambda: guest.cpus[0].record[0]["mode"] == 1, "guest mode")
        start = time.perf_counter()
        guest.cpus[0].kick()
        times.append(time.perf_counter() - start)
        assert guest.finish().reason is ExitReason.INTR


def stop_often(guest, times):
    for _ in range(times):
        guest.start()
        wait_until(lambda: guest.cpus[0].record[0]["mode"] == 1, "guest mode")
        guest.cpus[0].kick()
        report = guest.finish()
        assert isinstance(report, Exit), report
        assert report.reason is ExitReason.INTR, report


def test_stops_fall_between_instructions(guest):
    """A load whose base it overwrites would fault if it were executed again after a stop."""
    guest.block.view[0x4000:0x4008] = (0x1234_5678).to_bytes(8, "little")
    guest.program(LOAD_DOUBLE, r0=RAM + 0x4000)
    stop_often(guest, 200)
    guest.cpus[0].set_state(guest.cpus[0].get_state())  # code is translated anew
    stop_often(guest, 200)


def test_device_accesses_are_made_once(guest):
    device = Register()
    guest.vm.add_mmio(UART, 4096, device)
    guest.program(OUTPUT, r0=UART, r1=0)
    stop_often(guest, 100)
    values = [access[3] for access in device.accesses]
    assert values == list(range(1, len(values) + 1))


def test_kick_before_run_counts(guest):
    guest.program(SPIN)
    guest.cpus[0].kick()
    guest.start()
    assert guest.finish().reason is ExitReason.INTR


def test_wfi_waits_without_burning_the_processor(guest):
    guest.program(WFI)
    guest.start()
    wait_until(lambda: guest.cpus[0].record[0]["wfis"] == 1, "the wfi")
    before = time.process_time()
    end = time.monotonic() + 0.2
    guest._threads[0].join(end - time.monotonic())
    assert guest._threads[0].is_alive()
    assert time.process_time() - before < 0.1
    guest.cpus[0].wake()
    assert powered_off(guest.finish())


def test_no_wfi_waits_while_an_interrupt_is_signalled(guest):
    """The line is a level (ARM DDI 0406C, B1.8.14): it ends each wfi until it is low again, not only the first."""
    guest.cpus[0].set_interrupt(True)
    assert powered_off(guest.run(WFI[:1] + WFI))
    guest.cpus[0].set_interrupt(False)
    guest.program(WFI)
    before = guest.cpus[0].record[0]["wfis"]
    guest.start()
    wait_until(lambda: guest.cpus[0].record[0]["wfis"] > before, "the wfi")
    guest._threads[0].join(0.1)
    assert guest._threads[0].is_alive()
    guest.cpus[0].set_interrupt(True)
    assert powered_off(guest.finish())


def test_kick_reaches_a_vcpu_in_wfi(guest):
    guest.program(WFI)
    guest.start()
    wait_until(lambda: guest.cpus[0].record[0]["wfis"] == 1, "the wfi")
    guest.cpus[0].kick()
    assert guest.finish().reason is ExitReason.INTR


def test_timer_ends_wfi_on_time(guest):
    guest.cpus[0].set_timer_wakes(True)
    guest.run(WFI)  # takes the wake-up that comes with it
    ticks = COUNTER_HZ // 20
    assert powered_off(guest.run(SLEEP, r0=ticks))
    assert guest.cpus[0].get_state().regs[8] >= ticks


def test_timer_without_its_interrupt_wakes_nobody(guest):
    guest.program(SLEEP, r0=1)
    guest.start()
    wait_until(lambda: guest.cpus[0].record[0]["wfis"] == 1, "the wfi")
    guest._threads[0].join(0.1)
    assert guest._threads[0].is_alive()
    guest.cpus[0].set_timer_wakes(True)
    assert powered_off(guest.finish())


def test_wfe_goes_on(guest):
    guest.program(WFE_LOOP, r1=0)
    guest.start()
    wait_until(lambda: guest.cpus[0].record[0]["entries"] > 50, "fifty wfe")
    guest.stop()
    assert guest.cpus[0].get_state().regs[1] > 10


def test_psci_starts_the_second_cpu(make_guest):
    guest = make_guest(smp=2)
    entry = CODE + 0x1000
    guest.program(STORE_CONTEXT, cpu=1, at=entry)
    state = guest.cpus[1].get_state()
    state.powered_off = True
    guest.cpus[1].set_state(state)
    guest.program(CPU_ON, r4=entry)
    guest.start()
    wait_until(lambda: word(guest.block, 0x4000_4004) != 0, "the second CPU")
    assert word(guest.block, 0x4000_4000) == 0x55
    assert word(guest.block, 0x4000_4004) == 0x8000_0001
    guest.stop()
    assert guest.cpus[0].get_state().regs[5] == 0
    assert not guest.cpus[1].get_state().powered_off


def test_device_accesses_reach_the_device(guest):
    device = Register()
    guest.vm.add_mmio(UART, 4096, device)
    guest.run(LOAD, r0=UART + 0x18)
    assert guest.cpus[0].get_state().regs[1] == 0x1234
    guest.run(STORE, r0=UART + 0x30, r1=0xABCD)
    assert device.accesses == [("read", 0x18, 4, 0), ("write", 0x30, 4, 0xABCD, 0)]


@pytest.mark.parametrize("take", [lambda vm: vm.unmap_range, lambda vm: vm.age_range])
def test_the_host_takes_no_devices_away(guest, take):
    """It takes memory, of which there is some in the same 2 MiB as a device, before and behind it."""
    at = Ipa(0x900_1000)
    block = RamBlock("beside", 2 * PAGE_SIZE)
    guest.vm.set_memory_slot(MemorySlot(1, Ipa(at - PAGE_SIZE), PAGE_SIZE, block))
    guest.vm.set_memory_slot(MemorySlot(2, Ipa(at + PAGE_SIZE), PAGE_SIZE, block, PAGE_SIZE))
    device = Register()
    guest.vm.add_mmio(at, PAGE_SIZE, device)
    for beside in (at - PAGE_SIZE, at + PAGE_SIZE):
        assert powered_off(guest.run(STORE, r0=beside, r1=1))
    taken = take(guest.vm)(Ipa(at - PAGE_SIZE), 3 * PAGE_SIZE)
    assert taken in (None, 2)
    for beside in (at - PAGE_SIZE, at + PAGE_SIZE):
        entry, _ = guest.vm.stage2.entry(Ipa(beside))
        assert not entry & armv7.FORMAT.access
    guest.run(LOAD, r0=at)
    assert device.accesses == [("read", 0, 4, 0)]


def test_device_added_to_a_running_vm(guest):
    guest.program(SPIN)
    guest.start()
    wait_until(lambda: guest.cpus[0].record[0]["mode"] == 1, "guest mode")
    device = Register()
    guest.vm.add_mmio(UART, 4096, device)
    guest.stop()
    guest.run(LOAD, r0=UART)
    assert device.accesses


def test_what_a_device_raises_reaches_the_caller_of_run(guest):
    guest.vm.add_mmio(UART, 4096, Broken())
    error = guest.run(LOAD, r0=UART)
    assert isinstance(error, ValueError)


def test_state_round_trip(guest, make_guest):
    state = guest.cpus[0].get_state()
    state.regs = [*range(100, 115), CODE]
    state.banked = {name: 0x1000 + i for i, name in enumerate(state.banked)}
    for i in (13, 14):
        state.banked[f"{'sp' if i == 13 else 'lr'}_svc"] = state.regs[i]
    for i in range(8, 13):
        state.banked[f"r{i}_usr"] = state.regs[i]
    state.vfp = [0x0123_4567_89AB_0000 + i for i in range(32)]
    state.fpscr = 0x0800_0000
    state.fpexc = 0x4000_0000
    state.cp15 = {one_reg: 0x100 * i for i, one_reg in enumerate(sorted(_PLAIN))}
    guest.cpus[0].set_state(state)
    other = make_guest()
    other.cpus[0].set_state(guest.cpus[0].get_state())
    read = other.cpus[0].get_state()
    assert read.regs == state.regs
    assert read.cpsr == state.cpsr
    assert read.banked == state.banked
    assert read.vfp == state.vfp
    assert (read.fpscr, read.fpexc) == (state.fpscr, state.fpexc)
    assert {one_reg: read.cp15[one_reg] for one_reg in state.cp15} == state.cp15


def test_saved_registers_are_the_guest_s_own(guest):
    """The non-secure copy of a banked register, which is the one that the guest writes."""
    guest.run(SET_REGISTERS, r0=0x4000_0000)
    cp15 = guest.cpus[0].get_state().cp15
    for register in (TPIDRURW, VBAR, TTBR0):
        assert cp15[register] == 0x4000_0000


def test_the_guest_keeps_its_access_to_vfp(guest, make_guest):
    """Elsewhere it is this register that decides whether a VFP instruction is undefined."""
    access = 0x00F0_0000
    guest.run(ENABLE_VFP, r0=access)
    state = guest.cpus[0].get_state()
    assert (state.regs[1], state.cp15[CPACR]) == (access, access)
    other = make_guest()
    other.cpus[0].set_state(state)
    assert other.cpus[0].get_state().cp15 == state.cp15


_PLAIN = {TPIDRURW, TPIDRURO, TPIDRPRW, DFAR, CNTV_CVAL}
"""Registers without bits of fixed value."""


def test_counter_can_be_set(guest):
    began = time.monotonic()
    guest.vm.set_counter(1 << 40)
    state = guest.cpus[0].get_state()
    assert 0 <= state.counter - (1 << 40) < (time.monotonic() - began + 0.001) * COUNTER_HZ
    guest.cpus[0].set_timer_wakes(True)
    guest.run(SLEEP, r0=1)
    assert guest.cpus[0].get_state().regs[14] >> 32 == 0
    assert guest.cpus[0].get_state().regs[1] == (1 << 40) >> 32


def test_vcpus_come_in_order(make_guest):
    guest = make_guest(smp=1)
    with pytest.raises(HypervisorError, match="vCPU 1"):
        guest.vm.create_vcpu(1)


def test_devices_keep_clear_of_memory_and_each_other(guest):
    guest.vm.add_mmio(UART, 4096, Register())
    for ipa, size in ((RAM, 4096), (RAM - 4096, 8192), (UART, 4096), (1 << 32, 4096), (UART + 1, 4096)):
        with pytest.raises(HypervisorError, match="a device at"):
            guest.vm.add_mmio(Ipa(ipa), size, Register())


def test_psci_says_when_a_start_is_pending(make_guest):
    guest = make_guest(smp=2)
    first, second = guest.vm.cpus
    call = [Function.CPU_ON, (1, CODE, 7), guest.vm.cpus, first, None]
    assert psci.call(*call) == Result.SUCCESS
    assert second.starting
    assert psci.call(*call) == Result.ON_PENDING & 0xFFFF_FFFF
    assert psci.call(Function.AFFINITY_INFO, (1, 0, 0), guest.vm.cpus, first, None) == 2
    assert second.get_state().regs[15] == CODE
    assert psci.call(*call) == Result.ALREADY_ON & 0xFFFF_FFFF


def test_a_cpu_starts_once_also_for_who_asks_while_it_does(make_guest, monkeypatch):
    guest = make_guest(smp=2)
    first, second = guest.vm.cpus
    uc, answers = second.engine.uc, []

    def cpu_on(entry):
        return psci.call(Function.CPU_ON, (1, entry, 7), guest.vm.cpus, first, None)

    def ask_and_write(*arguments):
        answers.append(cpu_on(CODE + 0x100))
        type(uc).reg_write(uc, *arguments)

    assert cpu_on(CODE) == Result.SUCCESS
    monkeypatch.setattr(uc, "reg_write", ask_and_write)
    state = second.get_state()
    starting = answers.index(Result.ALREADY_ON & 0xFFFF_FFFF)
    assert starting > 0
    assert set(answers[:starting]) == {Result.ON_PENDING & 0xFFFF_FFFF}
    assert set(answers[starting:]) == {Result.ALREADY_ON & 0xFFFF_FFFF}, "get_state visits the modes"
    assert (state.regs[0], state.regs[15], state.powered_off) == (7, CODE, False)
    assert not second.starting


def test_a_cpu_that_is_started_is_reset(make_guest):
    """As the kernel's KVM does it: nothing of what it was before it went off is left."""
    guest = make_guest(smp=2)
    first, second = guest.vm.cpus
    new = second.get_state()
    used = copy.deepcopy(new)
    used.regs = [*range(100, 115), CODE]
    used.banked = {name: 0x1000 + i for i, name in enumerate(used.banked)}
    used.vfp, used.fpscr, used.fpexc = [*range(32)], 0x0800_0000, 0x4000_0000
    used.cp15 |= dict.fromkeys(_PLAIN, 0x500)
    used.cp15[SCTLR] |= 1  # M
    used.cpsr, used.powered_off = 0x6000_01D1, False
    second.set_state(used)
    psci.call(Function.CPU_OFF, (0, 0, 0), guest.vm.cpus, second, None)
    psci.call(Function.CPU_ON, (1, CODE + 0x101, 7), guest.vm.cpus, first, None)
    state = second.get_state()
    assert (state.cpsr, state.powered_off) == (0x1F3, False), "supervisor mode, Thumb, all masked"
    assert state.regs == [7, *new.regs[1:15], CODE + 0x100]
    assert (state.banked, state.cp15) == (new.banked, new.cp15)
    assert (state.vfp, state.fpscr, state.fpexc) == (new.vfp, new.fpscr, new.fpexc)


def test_a_cpu_that_is_started_runs_what_is_there_now(make_guest):
    """Its instruction cache is empty after a reset."""
    guest = make_guest(smp=2)
    first, second = guest.vm.cpus
    guest.program([0xE3A05001, *POWER_OFF], cpu=1)  # mov r5, #1
    for value in (1, 2):
        guest.start(1)
        assert powered_off(guest.finish(1))
        assert second.get_state().regs[5] == value
        psci.call(Function.CPU_OFF, (0, 0, 0), guest.vm.cpus, second, None)
        load(guest.block, [0xE3A05002, *POWER_OFF])
        psci.call(Function.CPU_ON, (1, CODE, 0), guest.vm.cpus, first, None)


def test_no_guest_runs_while_the_cpu_of_another_vm_is_made(guest, monkeypatch):
    """Meanwhile the emulator's clock is not the guest's: a timer that is set by it would fire in decades."""
    from sterna.hypervisor.emulated import guestmode
    from sterna.hypervisor.emulated.vm import EmulatedVm

    def mode():
        return int(guest.cpus[0].record[0]["mode"])

    def in_guest():
        return mode() == guestmode.IN_GUEST

    guest.program(SPIN)
    guest.start()
    wait_until(in_guest, "guest mode")
    other = EmulatedVm()
    make, seen = other._cpu_class, set()

    def watched(*arguments):
        seen.update(mode() for _ in range(1000))
        return make(*arguments)

    monkeypatch.setattr(other, "_cpu_class", watched)
    other.create_vcpu(0)
    assert seen == {guestmode.OUTSIDE}
    wait_until(in_guest, "guest mode once more")
    other.close()
    guest.stop()
