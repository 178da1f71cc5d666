"""vCPUs of ARMv7 guests on the kernel's KVM: exits, sleep, PSCI, devices, state, time."""

import threading
import time
from contextlib import ExitStack

import pytest
from tests.hypervisor.programs import (
    CODE,
    CPU_ON,
    JUMP,
    OUTPUT,
    POWER_OFF,
    RAM,
    SET_REGISTERS,
    SPIN,
    STORE,
    STORE_CONTEXT,
    TOUCH,
    WFI,
    load,
    word,
)

from sterna.arch.arm import sysreg
from sterna.arch.arm.kvm import onereg
from sterna.arch.arm64.kvm import Arm64KvmVm
from sterna.hypervisor.interface import Exit, ExitReason, HypervisorError, MemorySlot, SlotFlags, SystemEvent
from sterna.hypervisor.kvm.ioctl import KvmError
from sterna.memory.address import Ipa

UART = Ipa(0x0900_0000)
OFF = Exit(ExitReason.SYSTEM_EVENT, event=SystemEvent.SHUTDOWN)
TIMER_ON = [0xE3A02001, 0xEE0E2F33]  # mov r2, #1; mcr p15, 0, r2, c14, c3, 1: CNTV_CTL
SLEEP_TWICE = [
    0xEC51EF1E,  # mrrc p15, 1, lr, r1, c14: CNTVCT
    0xEE0E0F13,  # mcr p15, 0, r0, c14, c3, 0: CNTV_TVAL
    *TIMER_ON,
    0xE320F003,  # wfi
    0xEE0E0F13,  # mcr p15, 0, r0, c14, c3, 0: CNTV_TVAL
    0xE320F003,  # wfi
    0xEC576F1E,  # mrrc p15, 1, r6, r7, c14: CNTVCT
    0xE056800E,  # subs r8, r6, lr
    *POWER_OFF,
]
# PSCI's answer takes r0 to r3.
LOAD = [0xE5905000, *POWER_OFF]  # ldr r5, [r0]
LOAD_TWO = [0xE8900060, *POWER_OFF]  # ldm r0, {r5, r6}


class Register:
    """A device of one register."""

    def __init__(self):
        self.value = 0x1234
        self.accesses = []
        self.accessed = threading.Event()

    def mmio_read(self, offset, size, cpu):
        self.accesses.append(("read", offset, size, cpu))
        self.accessed.set()
        return self.value

    def mmio_write(self, offset, size, value, cpu):
        self.accesses.append(("write", offset, size, value, cpu))
        self.accessed.set()


@pytest.fixture
def guest(make_guest):
    return make_guest()


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_program_runs_and_switches_off(guest):
    assert guest.run(TOUCH, r0=RAM + 0x10_0000, r1=16, r2=7) == OFF
    assert word(guest.block, RAM + 0x10_F000) == 7
    assert word(guest.block, RAM + 0x11_0000) == 0


def test_a_kick_ends_a_run_and_one_before_is_not_lost(guest):
    guest.start(SPIN)
    guest.cpus[0].kick()
    assert guest.finish() == Exit(ExitReason.INTR)
    before = guest.cpus[0].get_state().regs[1]
    guest.cpus[0].kick()
    guest.resume()
    assert guest.finish() == Exit(ExitReason.INTR)
    assert guest.cpus[0].get_state().regs[1] >= before


def test_an_interrupt_ends_a_wfi(guest):
    guest.start(WFI)
    wait_until(lambda: guest.vm.statistics()["vcpu_wfis"] > 0)
    assert guest.running()
    guest.cpus[0].set_interrupt(True)
    assert guest.finish() == OFF
    assert guest.run(WFI[:1] + WFI) == OFF, "the line is a level"


def test_a_kick_ends_a_wfi(guest):
    guest.start(WFI)
    wait_until(lambda: guest.vm.statistics()["vcpu_wfis"] > 0)
    guest.cpus[0].kick()
    assert guest.finish() == Exit(ExitReason.INTR)


def test_the_virtual_timer_ends_a_wfi_again_and_again(guest):
    ticks = guest.vm.counter_hz // 100
    assert guest.run(SLEEP_TWICE, r0=ticks) == OFF
    assert guest.cpus[0].get_state().regs[8] >= 2 * ticks


def test_devices_are_read_and_written(guest):
    device = Register()
    guest.vm.add_mmio(UART, 4096, device)
    assert guest.run(LOAD, r0=UART + 0x18) == OFF
    assert guest.cpus[0].get_state().regs[5] == 0x1234
    guest.run(STORE, r0=UART + 4, r1=0x55)
    assert device.accesses == [("read", 0x18, 4, 0), ("write", 4, 4, 0x55, 0)]


def test_state_after_a_device_access_has_its_result(guest):
    device = Register()
    guest.vm.add_mmio(UART, 4096, device)
    guest.start(OUTPUT, r0=UART, r1=0)
    assert device.accessed.wait(300)
    guest.stop()
    state = guest.cpus[0].get_state()
    assert state.regs[1] - device.accesses[-1][3] in (0, 1)


def test_accesses_outside_memory_are_reported(guest):
    report = guest.run(LOAD, r0=0x0A00_0000)
    assert report.reason is ExitReason.INTERNAL_ERROR
    assert "vCPU 0: access outside memory at IPA 0xa000000, pc 0x40008000" in report.detail
    report = guest.run(LOAD_TWO, r0=0x0A00_0000)
    assert "by an instruction that KVM cannot emulate there" in report.detail


def test_a_write_to_read_only_memory_is_reported(guest):
    guest.vm.set_memory_slot(
        MemorySlot(1, Ipa(0x6000_0000), 4096, guest.block, offset=1 << 20, flags=SlotFlags.READONLY)
    )
    guest.block.data[1 << 20] = 9
    assert guest.run(LOAD, r0=0x6000_0000) == OFF
    assert guest.cpus[0].get_state().regs[5] == 9
    assert "write to read-only memory at IPA 0x60000000" in guest.run(STORE, r0=0x6000_0000, r1=1).detail


def test_psci_starts_a_cpu(make_guest):
    guest = make_guest(smp=2)
    assert guest.cpus[1].get_state().powered_off
    load(guest.block, STORE_CONTEXT, CODE + 0x100)
    guest.resume(1)
    guest.start(CPU_ON, r4=CODE + 0x100)
    wait_until(lambda: word(guest.block, RAM + 0x4004))
    assert word(guest.block, RAM + 0x4000) == 0x55
    assert word(guest.block, RAM + 0x4004) & 0xFF == 1
    guest.stop()
    assert guest.cpus[0].get_state().regs[5] == 0
    assert not guest.cpus[1].get_state().powered_off


def test_all_cpus_run_at_once_on_boards_without_psci(make_guest):
    guest = make_guest(smp=2, secondaries_off=False)
    assert not guest.cpus[1].get_state().powered_off


def test_state_set_is_state_got_and_power_goes_with_it(make_guest):
    guest = make_guest(smp=2)
    guest.run(SET_REGISTERS, r0=0x4000_0000)
    state = guest.cpus[0].get_state()
    state.banked["sp_irq"], state.banked["spsr_fiq"], state.vfp[31] = 0x1111, 0x1D1, (1 << 64) - 3
    state.powered_off = True
    state.fpscr, state.fpexc = 0x0300_0000, 0x4000_0000
    guest.cpus[1].set_state(state)
    copy = guest.cpus[1].get_state()
    copy.counter = state.counter
    assert copy == state


def test_every_register_that_the_kernel_lists_can_be_read_and_set_back(guest):
    fd = guest.cpus[0].fd
    registers = onereg.list_registers(fd)
    assert len(registers) > 100
    for register in registers:
        onereg.put(fd, register, onereg.get(fd, register))


def test_a_register_that_cannot_be_set_is_named_with_what_is_here(guest):
    midr = sysreg.encode(3, 0, 0, 0, 0)
    here = onereg.get(guest.cpus[0].fd, midr)
    with pytest.raises(HypervisorError, match=f"{midr:#x} cannot be set to .* on this host: it is {here:#x}"):
        onereg.put(guest.cpus[0].fd, midr, here ^ 1)
    with pytest.raises(KvmError, match="KVM_GET_ONE_REG"):
        onereg.get(guest.cpus[0].fd, sysreg.encode(3, 7, 15, 15, 7))


def test_the_counter_goes_on_from_where_it_is_set_on_all_cpus(make_guest):
    guest = make_guest(smp=2)
    guest.vm.set_counter(1 << 40)
    first = guest.vm.counter()
    second = guest.cpus[1].get_state().counter
    assert 1 << 40 <= first <= second < (1 << 40) + 60 * guest.vm.counter_hz


def test_the_physical_counter_goes_with_the_virtual_one(kvm):
    """A VM's vCPUs share both, and a guest compares its timers with either: their distance is the guest's, wherever it is."""
    with ExitStack() as stack:
        vms = [Arm64KvmVm(2) for _ in range(2)]
        for vm in vms:
            stack.callback(vm.close)
            for index in range(2):
                vm.create_vcpu(index)
        here, there = vms
        if sysreg.CNTPCT not in onereg.list_registers(here.cpus[0].fd):
            return  # Linux before 6.4
        hour = 3600 * here.counter_hz
        first = distance(here)
        here.set_counter(here.counter() + 5 * hour)
        assert abs(distance(here) - first) < hour
        states = [cpu.get_state() for cpu in here.cpus]
        for cpu, state in zip(there.cpus, states, strict=True):
            assert abs(state.system[sysreg.CNTPCT] - state.counter - first) < hour
            state.system[sysreg.CNTPCT] += 7 * hour
            cpu.set_state(state)
        there.set_counter(states[0].counter + 3 * hour)
        assert abs(distance(there) - first - 7 * hour) < hour
        there.set_counter(9 * hour)
        assert abs(distance(there) - first - 7 * hour) < hour


def distance(vm):
    """How far CNTPCT is ahead of CNTVCT."""
    virtual, physical = (onereg.get(vm.cpus[0].fd, register) for register in (sysreg.CNTVCT, sysreg.CNTPCT))
    return physical - virtual


def test_a_jump_to_nowhere_does_not_hang(guest):
    guest.start(JUMP, r0=0x0A00_0000)
    guest.stop()
