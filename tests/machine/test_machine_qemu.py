"""Against a real QEMU: the state it writes, and a guest that goes on running in it."""

import re
import select
import socket
import struct
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.clockguest import last_sequence
from tests.machine.parts import Parts, cpu, load, save
from tests.savedstream import saved, saving

from sterna.boards.virt import BOARD as VIRT
from sterna.guests import catalog
from sterna.machine.migratable import MigratableMachine
from sterna.machine.runstate import RunState
from sterna.migration.controller import MigrationController

pytestmark = pytest.mark.qemu

SECONDS = 300
SO_ACCEPTCON = 0x10000
"""A socket listens (linux/net.h)."""
DESCRIPTIONS = Parts([cpu()]).descriptions


class Console:
    """What a QEMU guest prints."""

    def __init__(self, process):
        self.text = b""
        self._file = process.stdout

    def wait_for(self, text, start=0):
        end = time.monotonic() + SECONDS
        while self.text.find(text, start) < 0:
            ready, _, _ = select.select([self._file], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} is not in {self.text[-500:]!r}"
            data = self._file.raw.read(4096)
            assert data, f"QEMU has ended after {self.text[-500:]!r}"
            self.text += data


@contextmanager
def qemu_running(qemu, *arguments):
    command = [
        qemu,
        "-M",
        "virt",
        "-cpu",
        "cortex-a15",
        "-m",
        "32",
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "stdio",
    ]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process, Console(process)
    finally:
        process.kill()
        process.wait(SECONDS)
        process.stdout.close()


def connect(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(SECONDS)
    end = time.monotonic() + SECONDS
    while connection.connect_ex(str(path)):
        assert time.monotonic() < end, f"nobody listens at {path}"
    return connection


def bodies(stream):
    """The body of each section that a machine of ours has: (name, instance) -> bytes."""
    found = {}
    for name in DESCRIPTIONS:
        for instance in range(4):
            key = bytes((len(name),)) + name.encode() + struct.pack(">I", instance)
            at = stream.find(key)
            while at >= 0 and stream[at - 5] != 4:  # SECTION_FULL
                at = stream.find(key, at + 1)
            if at >= 0:
                start = at + len(key) + 4
                # What looks like the footer may be data: behind the footer a section or the end of the stream begins.
                footer = re.escape(b"\x7e" + stream[at - 4 : at])
                ends = re.compile(footer + rb"(?:\x04\0\0|\0\x06)", re.DOTALL).search(stream, start)
                assert ends is not None, (name, instance)
                found[name, instance] = stream[start : ends.start()]
    return found


@pytest.mark.parametrize("smp", [1, 2])
def test_sections_of_qemu_decode_and_encode_to_the_same_bytes(qemu, tmp_path, smp):
    """The state of a guest that has run: each section comes out as it went in, and so does what our machine makes of it."""
    monitor, file = tmp_path / "monitor", tmp_path / "stream"
    kernel = ["-kernel", str(catalog.find("clock", "virt")), "-append", "10", "-smp", str(smp)]
    with qemu_running(qemu, *kernel, "-monitor", f"unix:{monitor},server=on,wait=off") as (process, console):
        console.wait_for(b"seq 5 ")
        with connect(monitor) as connection:
            connection.sendall(f'stop\nmigrate "{saving(file)}"\nquit\n'.encode())
            while connection.recv(4096):
                pass
        assert process.wait(SECONDS) == 0
    found = bodies(saved(file))
    expected = {(name, i) for name in ("cpu", "cpu_common") for i in range(smp)}
    expected |= {(name, 0) for name in ("timer", "arm_gic", "pl011", "globalstate")}
    assert set(found) == expected
    states = []
    for (name, instance), body in found.items():
        description = DESCRIPTIONS[name]
        state = description.decode(body, instance_id=instance)
        assert description.encode(state) == body, name
        states.append(state)
    machine = load(states, smp)
    assert machine.run_state is RunState.PAUSED
    assert machine.counter > 0
    assert machine.cpus[0].regs[15] >> 20 == VIRT.ram_base >> 20 | 2, "the guest's code is at 2 MiB"
    ours = {(state.name, state.instance_id): state for state in save(machine)}
    for index in range(smp):
        theirs = next(state for state in states if (state.name, state.instance_id) == ("cpu", index))
        fields = ours["cpu", index].fields
        different = {name for name in fields if fields[name] != theirs.fields[name]}
        # What QEMU keeps of things past: registers of other modes that are stale, a reservation, when a timer last expired.
        stale = {
            "env.banked_r13",
            "env.banked_r14",
            "env.banked_spsr",
            "env.usr_regs",
            "env.spsr",
            "gt_timer[1]",
        }
        stale |= {"env.exclusive_addr", "env.exclusive_val", "env.exclusive_high"}
        stale |= {name for name in fields if name.startswith("env.exception.")}
        values, their_values = cpregs(fields), cpregs(theirs.fields)
        differing = {
            (hex(register), hex(values[register]), hex(their_values[register]))
            for register in values
            if values[register] != their_values[register]
        }
        assert (set(values), differing) == (set(their_values), set())
        assert different <= stale
    assert ours["pl011", 0] == next(state for state in states if state.name == "pl011")


@pytest.mark.parametrize(("kernel", "append"), [("clock", "20"), ("random", "5 256 4")])
def test_a_guest_moves_to_qemu_and_goes_on(qemu, make_machine, tmp_path, kernel, append):
    path = tmp_path / "incoming"
    source = make_machine(kernel=kernel, append=append, smp=2)
    source.cont()
    assert source.serial.wait_for(b"seq 3 " if kernel == "clock" else b"filled", SECONDS)
    with qemu_running(qemu, "-smp", "2", "-incoming", f"unix:{path}") as (process, console):
        connect_when_there(path)
        with MigrationController(MigratableMachine(source)) as migration:
            migration.migrate(f"unix:{path}")
            info = migration.wait(SECONDS)
            assert info.status.value == "completed", info.error
        assert source.run_state is RunState.POSTMIGRATE
        if kernel == "clock":
            sequence = last_sequence(bytes(source.serial.output))
            console.wait_for(f"seq {sequence + 2} ".encode())
            console.wait_for(f"seq {sequence + 5} ".encode())
            assert b"backward 0" in console.text
        assert process.poll() is None


def connect_when_there(path):
    """Return when QEMU listens, without taking the one connection it accepts."""
    end = time.monotonic() + SECONDS
    while not listens(path):
        assert time.monotonic() < end
        time.sleep(0.001)


def listens(path):
    """The path is there before that: it is bound first."""
    sockets = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(fields[7:] == [str(path)] and int(fields[3], 16) & SO_ACCEPTCON for fields in sockets)


def cpregs(fields):
    return dict(zip(fields["cpreg_vmstate_indexes"], fields["cpreg_vmstate_values"], strict=True))
