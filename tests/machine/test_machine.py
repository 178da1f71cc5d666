"""Machines that run guests."""

import gc
import os
import resource
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tests.clockguest import last_sequence
from tests.hosttree import HostTree
from tests.hypervisor.conftest import wait_until
from tests.hypervisor.programs import LOAD, SPIN, STORE, UNDEFINED
from tests.refusal import refuse_threads

from sterna.arch.arm.timer import COUNTER_HZ
from sterna.boards.virt import BOARD as VIRT
from sterna.guests import layout
from sterna.guests.catalog import GuestError
from sterna.host import limits
from sterna.hypervisor.emulated.vcpu import EmulatedVcpu
from sterna.hypervisor.interface import HypervisorError
from sterna.machine.config import ConfigError
from sterna.machine.devices.gic.controller import Gic
from sterna.machine.devices.gic.registers import CpuInterface, Distributor
from sterna.machine.devices.pl011 import Interrupt, Pl011, Register
from sterna.machine.guestram import AddressError
from sterna.machine.loader import LoadError
from sterna.machine.migratable import MigratableMachine as Guest
from sterna.machine.runstate import RunState, RunStateError
from sterna.machine.serial import SerialError
from sterna.memory.bitmap import page_numbers
from sterna.ownership import Event, NotTheOwner
from sterna.stream.vmstate import DeviceState, StreamError

TIMEOUT_S = 300
RAM_BASE = 0x4000_0000
POWER_OFF = [0xE3000008, 0xE3480400, 0xE1400070, 0xEAFFFFFE]  # PSCI SYSTEM_OFF
RESET = [0xE3000009, 0xE3480400, 0xE1400070, 0xEAFFFFFE]  # PSCI SYSTEM_RESET
COUNT = [0xE5810000, 0xE2800001, 0xEAFFFFFC]  # str r0, [r1]; add r0, r0, #1; b .-8


class Events:
    """A machine's events, in order."""

    def __init__(self, machine):
        self.seen = []
        self._machine = machine
        self._changed = threading.Condition()
        self.unsubscribe = machine.subscribe(self._add)

    def _add(self, name, data):
        with self._changed:
            self.seen.append((name, data, self._machine.run_state))
            self._changed.notify_all()

    @property
    def names(self):
        return [name for name, _, _ in self.seen]

    def wait_for(self, name):
        with self._changed:
            assert self._changed.wait_for(lambda: name in self.names, TIMEOUT_S), self.names


MIGRATION = bytes(range(16))


def move(source, destination, elapsed_ns=0):
    """Migrate by hand: RAM and devices, through the bytes of their sections."""
    Guest(source).stop_for_migration()
    destination.ram_blocks[0].data[:] = source.ram_blocks[0].data
    Guest(destination).load_devices(through_bytes(source))
    source.ownership.apply(Event.COMMIT_SENT, MIGRATION)
    destination.ownership.apply(Event.TAKEN_OVER, MIGRATION)
    Guest(destination).advance_counter(elapsed_ns)
    source.ownership.apply(Event.RUNS, MIGRATION)
    Guest(source).migrated_away()
    return Guest(destination).resume()


def through_bytes(source):
    layouts = Guest(source).descriptions
    return [
        layouts[state.name].decode(layouts[state.name].encode(state), instance_id=state.instance_id)
        for state in Guest(source).save_devices()
    ]


def device(machine, kind):
    """The first of the machine's devices of a kind."""
    return next(device for device in machine.hardware.devices if isinstance(device, kind))


def seq(machine):
    return last_sequence(bytes(machine.serial.output))


def wait_for_seq(machine, number):
    assert machine.serial.wait_for(f"seq {number} ".encode(), TIMEOUT_S), bytes(machine.serial.output)


def test_coming_up(make_machine):
    machine = make_machine(kernel="clock", append="10", smp=2)
    assert machine.run_state is RunState.PRELAUNCH
    assert (Guest(machine).machine_type, Guest(machine).page_bits) == ("virt-7.2", 12)
    assert [block.name for block in machine.ram_blocks] == ["mach-virt.ram"]
    assert [cpu.index for cpu in machine.cpus()] == [0, 1]
    assert all(cpu.thread_id > 0 for cpu in machine.cpus())
    assert "R15=402" in machine.registers(0)
    assert "powered off" in machine.registers(1)
    assert machine.read_physical(RAM_BASE, 4) == b"\xd0\x0d\xfe\xed", "the device tree"


@pytest.mark.parametrize("board", ["virt", "vexpress-a15"])
@pytest.mark.parametrize("smp", [1, 4])
def test_shipped_guests_run(make_machine, board, smp):
    machine = make_machine(machine=board, kernel="dirtyram", append="512 64 1", smp=smp)
    machine.cont()
    base = machine.config.board.ram_base
    page = base + layout.STATUS_OFFSET
    end = time.monotonic() + TIMEOUT_S
    work = machine.ram_blocks[0].data[layout.WORK_OFFSET : layout.WORK_OFFSET + 512 * 4096].reshape(512, 4096)
    while not np.all(work[:, :4].any(axis=1)):
        assert time.monotonic() < end, machine.read_physical(page, 64)
    assert machine.run_state is RunState.RUNNING
    machine.stop()
    assert machine.error is None
    before = machine.read_physical(page, 4096)
    assert machine.read_physical(page, 4096) == before


def test_stop_and_cont(make_machine):
    machine = make_machine(kernel="clock", append="10")
    events = Events(machine)
    machine.cont()
    machine.cont()
    wait_for_seq(machine, 3)
    machine.stop()
    machine.stop()
    assert machine.run_state is RunState.PAUSED
    stopped = bytes(machine.serial.output)
    ram = machine.ram_blocks[0].data.tobytes()
    machine.registers(0)
    assert machine.ram_blocks[0].data.tobytes() == ram
    assert bytes(machine.serial.output) == stopped
    machine.cont()
    wait_for_seq(machine, seq(machine) + 3)
    assert events.names == ["RESUME", "STOP", "RESUME"]
    events.unsubscribe()
    machine.stop()
    assert len(events.names) == 3


def test_the_counter_stands_still_while_paused(make_machine):
    """The clock guest sees no gap however long it was paused."""
    machine = make_machine(kernel="clock", append="10")
    machine.cont()
    wait_for_seq(machine, 3)
    machine.stop()
    Guest(machine).stop_for_migration()
    stopped = counter_of(machine)
    paused_at = time.monotonic()
    Guest(machine).resume()
    assert machine.run_state is RunState.PAUSED
    Guest(machine).stop_for_migration()
    assert counter_of(machine) == stopped
    Guest(machine).resume()
    machine.cont()
    Guest(machine).stop_for_migration()
    went_on = counter_of(machine) - stopped
    assert 0 <= went_on / COUNTER_HZ <= time.monotonic() - paused_at


def counter_of(machine):
    return Guest(machine).save_devices()[0].fields["cpu_clock_offset"] // 16


def test_registers_of_a_running_guest(make_machine, make_kernel):
    machine = make_machine(kernel=make_kernel(SPIN))
    machine.cont()
    events = Events(machine)
    text = machine.registers(0)
    assert "PSR=" in text
    assert machine.run_state is RunState.RUNNING
    assert events.names == []
    with pytest.raises(ValueError, match="CPU 1"):
        machine.registers(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (UNDEFINED, "undefined instruction 0xe7f000f0, pc 0x40200000"),
        ([0xE3A00202, *LOAD], "IPA 0x20000000, pc 0x40200004"),
        ([0xE3A00202, *STORE], "IPA 0x20000000, pc 0x40200004"),
        ([0xE3A00202, 0xE12FFF10], "IPA 0x20000000, pc 0x20000000"),
        ([0xEF000000], "supervisor call"),
    ],
)
def test_a_guest_that_does_the_impossible(make_machine, make_kernel, words, message):
    machine = make_machine(kernel=make_kernel(words), smp=2)
    events = Events(machine)
    machine.cont()
    events.wait_for("STOP")
    assert machine.run_state is RunState.INTERNAL_ERROR
    report = machine.error.splitlines()
    assert "vCPU 0: " in report[0]
    assert message in report[0]
    assert report[1].startswith("R00=")
    assert any(line.startswith("PSR=") for line in report)
    with pytest.raises(RunStateError, match="internal-error"):
        machine.cont()
    machine.stop()
    assert machine.run_state is RunState.INTERNAL_ERROR


@pytest.mark.parametrize(("words", "reason"), [(POWER_OFF, "guest-shutdown"), (RESET, "guest-reset")])
def test_a_guest_that_ends(make_machine, make_kernel, words, reason):
    machine = make_machine(kernel=make_kernel(words), smp=2)
    events = Events(machine)
    machine.cont()
    events.wait_for("STOP")
    assert events.names == ["RESUME", "SHUTDOWN", "STOP"]
    assert events.seen[1][1] == {"guest": True, "reason": reason}
    assert machine.run_state is RunState.SHUTDOWN
    assert machine.error is None
    with pytest.raises(RunStateError, match="shutdown"):
        machine.cont()


@pytest.mark.slow
def test_an_end_that_coincides_with_a_stop_is_not_lost(make_machine, make_kernel):
    for attempt in range(20):
        machine = make_machine(
            kernel=make_kernel([*[0xE1A00000] * attempt, *POWER_OFF]), memory_bytes=4 << 20
        )
        events = Events(machine)
        machine.cont()
        machine.stop()
        if machine.run_state is RunState.PAUSED:
            machine.cont()
        events.wait_for("SHUTDOWN")
        machine.stop()
        assert machine.run_state is RunState.SHUTDOWN
        assert events.names.count("SHUTDOWN") == 1


def test_shutdown_by_the_host(make_machine):
    machine = make_machine(kernel="clock")
    events = Events(machine)
    machine.cont()
    machine.shutdown()
    machine.shutdown()
    assert machine.run_state is RunState.SHUTDOWN
    assert events.names == ["RESUME", "STOP", "SHUTDOWN"]
    assert events.seen[2][1]["guest"] is False


def test_dirty_log(make_machine, make_kernel):
    machine = make_machine(kernel=make_kernel(COUNT))
    vcpu_page = 0x300
    machine.hardware.platform.vcpus[0].set_state(with_register(machine, 1, RAM_BASE + vcpu_page * 4096))
    machine.cont()
    Guest(machine).start_dirty_logging()
    Guest(machine).start_dirty_logging()
    Guest(machine).harvest()
    end = time.monotonic() + TIMEOUT_S
    while True:
        (batch,) = Guest(machine).harvest()
        pages = page_numbers(batch.words).tolist()
        if pages:
            break
        assert time.monotonic() < end
    assert (batch.block, pages) == ("mach-virt.ram", [vcpu_page])
    machine.hardware.ram.write(RAM_BASE + 4096 * 10 - 2, b"host")
    machine.stop()
    pages = page_numbers(Guest(machine).harvest()[0].words).tolist()
    assert set(pages) - {vcpu_page} == {9, 10}
    Guest(machine).stop_dirty_logging()
    Guest(machine).stop_dirty_logging()
    with pytest.raises(HypervisorError):
        Guest(machine).harvest()


def with_register(machine, number, value):
    state = machine.hardware.platform.vcpus[0].get_state()
    state.regs[number] = value
    return state


@pytest.mark.parametrize("board", ["virt", "vexpress-a15"])
def test_a_guest_moves(make_machine, board):
    source = make_machine(machine=board, kernel="clock", append="10", smp=2)
    destination = make_machine(machine=board, incoming=True, smp=2)
    source_events, events = Events(source), Events(destination)
    assert destination.run_state is RunState.INMIGRATE
    source.cont()
    wait_for_seq(source, 3)
    move(source, destination)
    assert (source.run_state, destination.run_state) == (RunState.POSTMIGRATE, RunState.RUNNING)
    last = seq(source)
    wait_for_seq(destination, last + 3)
    assert b"backward 0" in destination.serial.output
    assert (source_events.names, events.names) == (["RESUME", "STOP"], ["RESUME"])
    with pytest.raises(NotTheOwner, match="runs at the destination"):
        source.cont()
    with pytest.raises(RunStateError, match="postmigrate"):
        Guest(source).resume()
    back = make_machine(machine=board, incoming=True, smp=2)
    move(destination, back)
    wait_for_seq(back, seq(destination) + 2)


def test_the_counter_jumps_by_the_downtime(make_machine):
    source = make_machine(kernel="clock", append="10")
    source.cont()
    wait_for_seq(source, 2)
    Guest(source).stop_for_migration()
    counter = counter_of(source)
    destination = make_machine(incoming=True, paused=True)
    Guest(destination).load_devices(Guest(source).save_devices())
    destination.ownership.apply(Event.TAKEN_OVER, MIGRATION)
    Guest(destination).advance_counter(250_000_000)
    Guest(destination).resume()
    assert destination.run_state is RunState.PAUSED
    Guest(destination).stop_for_migration()
    assert counter_of(destination) - counter == COUNTER_HZ // 4


def test_a_failed_migration_costs_the_guest_no_time(make_machine):
    machine = make_machine(kernel="clock", append="10")
    machine.cont()
    wait_for_seq(machine, 2)
    began = time.monotonic()
    Guest(machine).stop_for_migration()
    stopped = time.monotonic()
    before = counter_of(machine)
    assert machine.run_state is RunState.FINISH_MIGRATE
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        pass
    resumed = time.monotonic()
    Guest(machine).resume()
    assert machine.run_state is RunState.RUNNING
    Guest(machine).stop_for_migration()
    gone = (counter_of(machine) - before) / COUNTER_HZ
    # The counter's ticks are 16 ns.
    assert resumed - stopped - 1e-6 <= gone <= time.monotonic() - began


def test_a_paused_guest_arrives_paused_and_loses_no_time(make_machine):
    source = make_machine(kernel="clock", append="10")
    source.cont()
    wait_for_seq(source, 2)
    source.stop()
    destination = make_machine(incoming=True)
    move(source, destination, elapsed_ns=10**9)
    assert destination.run_state is RunState.PAUSED
    Guest(destination).stop_for_migration()
    assert counter_of(destination) == counter_of_stopped(source)
    Guest(destination).resume()
    destination.cont()
    wait_for_seq(destination, seq(source) + 2)


def counter_of_stopped(machine):
    return machine.stopped_counter


def test_stop_during_the_switchover_is_obeyed_after_it_failed(make_machine):
    machine = make_machine(kernel="clock")
    machine.cont()
    Guest(machine).stop_for_migration()
    machine.stop()
    Guest(machine).resume()
    assert machine.run_state is RunState.PAUSED


@pytest.mark.parametrize(
    ("paused", "command", "expected"), [(True, "cont", "running"), (False, "stop", "paused")]
)
def test_cont_and_stop_before_the_guest_is_there(make_machine, paused, command, expected):
    source = make_machine(kernel="clock", append="10")
    source.cont()
    wait_for_seq(source, 1)
    destination = make_machine(incoming=True, paused=paused)
    getattr(destination, command)()
    assert destination.run_state is RunState.INMIGRATE
    move(source, destination)
    assert destination.run_state.value == expected


def test_a_guest_that_ended_migrates_as_ended(make_machine, make_kernel):
    source = make_machine(kernel=make_kernel(POWER_OFF))
    events = Events(source)
    source.cont()
    events.wait_for("STOP")
    destination = make_machine(incoming=True)
    move(source, destination)
    assert destination.run_state is RunState.SHUTDOWN


def test_loading_is_all_or_nothing(make_machine):
    source = make_machine(kernel="clock", append="10")
    source.cont()
    wait_for_seq(source, 2)
    Guest(source).stop_for_migration()
    good = Guest(source).save_devices()
    destination = make_machine(incoming=True)
    before = destination.registers(0)
    for bad in (good[:-2], [*good, DeviceState("pl031", 0, 1, {})], good[1:]):
        with pytest.raises(StreamError):
            Guest(destination).load_devices(bad)
        assert destination.registers(0) == before
        with pytest.raises(RunStateError, match="not arrived"):
            Guest(destination).resume()
    Guest(destination).load_devices(good)
    assert destination.registers(0) != before


def test_calls_in_the_wrong_state(make_machine):
    machine = make_machine(kernel="clock")
    for call in (
        Guest(machine).resume,
        Guest(machine).save_devices,
        Guest(machine).migrated_away,
        lambda: Guest(machine).load_devices([]),
    ):
        with pytest.raises(RunStateError, match="prelaunch"):
            call()
    waiting = make_machine(incoming=True)
    with pytest.raises(RunStateError, match="inmigrate"):
        Guest(waiting).stop_for_migration()


def test_memory_outside_ram(make_machine):
    machine = make_machine()
    size = machine.config.memory_bytes
    assert machine.read_physical(RAM_BASE + size - 4, 4) == bytes(4)
    for ipa, count in ((RAM_BASE + size - 3, 4), (0, 1), (RAM_BASE - 1, 2), (RAM_BASE, -1), (1 << 70, 1)):
        with pytest.raises(AddressError, match="not in RAM"):
            machine.read_physical(ipa, count)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kernel": "no-such-guest"}, LoadError, "no-such-guest: neither a file nor a guest program"),
        ({"kernel": "/nonexistent.elf"}, LoadError, "No such file"),
        ({"kernel": "dirtyram", "append": "0 0 0"}, GuestError, "PAGES"),
        ({"kernel": "dirtyram", "append": "999999 1 1"}, GuestError, "room for"),
        ({"accel": "kvm", "machine": "vexpress-a15"}, HypervisorError, "accel kvm: "),
        ({"machine": "pc-min"}, HypervisorError, "no x86_64 CPU"),
        ({"serial": "file:/nonexistent/log"}, SerialError, "No such file"),
    ],
)
def test_machines_that_cannot_be(make_machine, settings, error, message):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=message) as caught:
        make_machine(**settings)
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before, "nothing stays open"


def test_a_host_that_refuses_the_memory(make_machine, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ROOT", HostTree(tmp_path, total=1 << 50).root)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        with pytest.raises(ConfigError, match=r"memory: .*the host cannot map"):
            make_machine(memory_bytes=1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_machine_for_which_the_host_has_too_few_threads_leaves_none(make_machine, monkeypatch):
    before = set(threading.enumerate())
    refuse_threads(monkeypatch, "vcpu1")
    with pytest.raises(RuntimeError, match="can't start new thread"):
        make_machine(smp=2)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("times", [1, None])
def test_a_guest_runs_though_there_is_no_thread_to_size_its_tlbs(make_machine, monkeypatch, times):
    refuse_threads(monkeypatch, "tlb-sizing", times)
    machine = make_machine(kernel="clock", append="10")
    machine.cont()
    wait_for_seq(machine, 1)
    machine.stop()
    machine.cont()
    wait_for_seq(machine, seq(machine) + 1)  # it has come to run once more
    machine.stop()
    assert (machine.hardware.vm.tlb_sizing._thread is not None) == (times == 1), "the next run is another try"
    machine.close()
    assert not any(thread.name == "tlb-sizing" for thread in threading.enumerate())


def test_input_reaches_the_guest(make_machine, make_kernel):
    echo = [
        0xE3A00409,  # mov r0, #0x09000000
        0xE5901018,  # ldr r1, [r0, #0x18]: FR
        0xE3110010,  # tst r1, #0x10: RXFE
        0x1AFFFFFC,  # bne (ldr r1)
        0xE5902000,  # ldr r2, [r0]
        0xE2822001,  # add r2, r2, #1
        0xE5802000,  # str r2, [r0]
        0xEAFFFFF8,  # b (ldr r1)
    ]
    machine = make_machine(kernel=make_kernel(echo))
    machine.cont()
    machine.serial.send(b"HAL")
    assert machine.serial.wait_for(b"IBM", TIMEOUT_S)


def test_statistics_are_the_hypervisors(make_machine):
    machine = make_machine(kernel="clock", append="10")
    machine.cont()
    wait_for_seq(machine, 1)
    assert machine.statistics()["faults_translation"] > 0


def test_a_guest_in_doubt_stays_stopped_until_its_user_forces_it(make_machine):
    source = make_machine(kernel="clock", append="50")
    source.cont()
    wait_for_seq(source, 1)
    Guest(source).stop_for_migration()
    source.ownership.apply(Event.COMMIT_SENT, MIGRATION)
    with pytest.raises(NotTheOwner):
        Guest(source).resume()
    Guest(source).leave_in_doubt()
    assert source.run_state is RunState.PAUSED
    assert gc.isenabled()
    before = seq(source)
    events = Events(source)
    with pytest.raises(NotTheOwner, match="may run at the migration's destination"):
        source.cont()
    assert not events.names, "nobody is told that it runs, and its cards stand still"
    source.registers(0)  # holds the vCPUs, and lets go of them
    assert (source.run_state, seq(source)) == (RunState.PAUSED, before)
    source.cont(force=True)
    wait_for_seq(source, before + 1)


def test_a_guest_that_its_source_may_have_kept_stays_stopped_until_its_user_forces_it(make_machine):
    source = make_machine(kernel="clock", append="50")
    source.cont()
    wait_for_seq(source, 1)
    Guest(source).stop_for_migration()
    here = make_machine(incoming=True)
    here.ram_blocks[0].data[:] = source.ram_blocks[0].data
    Guest(here).load_devices(through_bytes(source))
    here.ownership.apply(Event.SHUT_SENT, MIGRATION)
    with pytest.raises(NotTheOwner):
        Guest(here).resume()
    Guest(here).leave_in_doubt()
    assert here.run_state is RunState.PAUSED
    with pytest.raises(NotTheOwner, match="may still run at the QEMU"):
        here.cont()
    here.cont(force=True)
    wait_for_seq(here, seq(source) + 2)


def test_a_guest_that_was_saved_goes_on(make_machine):
    source = make_machine(kernel="clock", append="50")
    source.cont()
    wait_for_seq(source, 1)
    Guest(source).stop_for_migration()
    source.ownership.apply(Event.SAVED, MIGRATION)
    Guest(source).migrated_away()
    assert source.run_state is RunState.POSTMIGRATE
    counter = counter_of_stopped(source)
    source.cont()
    assert source.run_state is RunState.RUNNING
    wait_for_seq(source, seq(source) + 1)
    source.stop()
    assert counter < counter_of_stopped(source) < counter + 60 * source.hardware.vm.counter_hz


def test_a_guest_that_went_away_runs_here_by_force_only(make_machine):
    source = make_machine(kernel="clock", append="50")
    Guest(source).stop_for_migration()
    source.ownership.apply(Event.COMMIT_SENT, MIGRATION)
    source.ownership.apply(Event.RUNS, MIGRATION)
    Guest(source).migrated_away()
    with pytest.raises(NotTheOwner, match="has migrated and runs at the destination"):
        source.cont()
    assert source.run_state is RunState.POSTMIGRATE
    source.cont(force=True)
    wait_for_seq(source, 1)


def test_a_guest_that_had_ended_when_it_was_saved_does_not_go_on(make_machine, make_kernel):
    source = make_machine(kernel=make_kernel(POWER_OFF))
    events = Events(source)
    source.cont()
    events.wait_for("STOP")
    Guest(source).stop_for_migration()
    source.ownership.apply(Event.SAVED, MIGRATION)
    Guest(source).migrated_away()
    with pytest.raises(RunStateError, match="shutdown"):
        source.cont(force=True)


def test_a_start_that_fails_leaves_nothing_running(make_machine, monkeypatch):
    machine = make_machine(kernel="clock", append="50")

    def fail():
        raise OSError("no tap")

    with monkeypatch.context() as patch:
        patch.setattr(machine.hardware.devices[-1], "resume", fail)
        with pytest.raises(OSError, match="no tap"):
            machine.cont()
    assert machine.run_state is RunState.PRELAUNCH
    machine.registers(0)
    assert not machine.serial.output
    machine.cont()
    wait_for_seq(machine, 1)


def test_a_listener_that_fails_stops_nothing(make_machine, caplog):
    machine = make_machine(kernel="clock", append="50")

    def fail(name, data):
        raise OSError("nobody there")

    machine.subscribe(fail)
    machine.cont()
    wait_for_seq(machine, 1)
    assert "a listener failed at the event RESUME" in caplog.text


def test_a_guest_that_went_away_cannot_migrate_again(make_machine):
    source = make_machine(kernel="clock")
    Guest(source).stop_for_migration()
    source.ownership.apply(Event.COMMIT_SENT, MIGRATION)
    source.ownership.apply(Event.RUNS, MIGRATION)
    Guest(source).migrated_away()
    with pytest.raises(RunStateError, match="postmigrate"):
        Guest(source).start_dirty_logging()
    with pytest.raises(RunStateError):
        Guest(source).stop_for_migration()
    assert gc.isenabled()


def test_what_fails_to_load_leaves_no_trace(make_machine):
    destination = make_machine(incoming=True)
    with pytest.raises(StreamError):
        Guest(destination).load_devices([])
    assert gc.isenabled()


def test_input_that_comes_while_the_machine_closes_is_nobodys(make_machine, tmp_path, monkeypatch):
    """It would raise the UART's interrupt at a vCPU that is gone."""
    machine = make_machine(serial=f"unix:{tmp_path}/line")
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.connect(f"{tmp_path}/line")
    uart = device(machine, Pl011)
    uart.mmio_write(Register.IMSC, 4, Interrupt.RX, 0)
    gic, irq = device(machine, Gic), VIRT.uarts[0].irq
    gic.write_distributor(Distributor.CTLR, 4, 1, 0)
    gic.write_distributor(Distributor.ISENABLER + 4 * (irq // 32), 4, 1 << irq % 32, 0)
    gic.write_cpu_interface(CpuInterface.CTLR, 1, 0)
    gic.write_cpu_interface(CpuInterface.PMR, 0xFF, 0)
    reader = machine.serial._thread
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    close = EmulatedVcpu.close

    def close_and_send(vcpu):
        close(vcpu)
        try:
            peer.send(b"x")
        except ConnectionError:
            return
        wait_until(lambda: uart.snapshot().read_count or not reader.is_alive())

    with peer, monkeypatch.context() as patch:
        patch.setattr(EmulatedVcpu, "close", close_and_send)
        machine.close()
    assert not failed
    assert uart.snapshot().read_count == 0
