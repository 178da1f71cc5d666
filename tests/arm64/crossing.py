"""The arm64 host's part of `test_crossing`: ARMv7 guests on KVM go to the machine that emulates this host, and come back.

    python3 -m tests.arm64.crossing PORT PORT

Two machines wait here, on ports 4321 and 4322, for guests to come back. A running guest goes to the first PORT there, and one
that stands still to the second. What the second is made of is written as a line of JSON before it goes and after it came back.
"""

import json
import sys
import time
from collections.abc import Callable

from tests.migration.machinehost import MachineHost

from sterna.guests.check import check_ram
from sterna.guests.layout import DirtyramWord, StatusError, read_status_of_ram
from sterna.machine.config import MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.runstate import RunState
from sterna.migration.statistics import MigrationStatus

OUTER = "10.0.2.2"
PORTS = (4321, 4322)
SMP = 2
MEMORY = 8 << 20
DIRTYRAM = "900 90 1"
TIMEOUT_S = 900
_SIGNIFICANT = {
    "sp_irq": 0x4010_1000,
    "lr_irq": 0x4010_1004,
    "spsr_irq": 0x6000_01D2,
    "sp_und": 0x4010_2000,
    "spsr_fiq": 0x1D1,
}
"""Banked registers that no guest program has set."""


def make(accel: str, **settings: object) -> MachineHost:
    """A machine of either hypervisor."""
    config = MachineConfig(machine="virt", accel=accel, smp=SMP, memory_bytes=MEMORY, **settings)  # type: ignore[arg-type]
    return MachineHost(Machine(config))


def wait_for_steps(host: MachineHost, more: int = 4) -> None:
    """The guest runs here: it makes so many steps more."""
    machine = host.machine
    end, first = time.monotonic() + TIMEOUT_S, None
    while first is None or read_status_of_ram(machine.ram_blocks[0].data).steps() < first + more:
        try:
            status = read_status_of_ram(machine.ram_blocks[0].data)
            everywhere = status.cpus == SMP and all(
                status.word(cpu, DirtyramWord.PASSES) for cpu in range(SMP)
            )
            if first is None and everywhere:
                first = status.steps()
        except StatusError:
            pass  # it has not come that far
        assert machine.error is None, machine.error
        assert time.monotonic() < end, "the guest does not go on"
        time.sleep(0.01)


def wait_arrived(host: MachineHost, check: Callable[[], None] = lambda: None) -> None:
    """A guest has come here.

    :param check: called meanwhile
    """
    end = time.monotonic() + TIMEOUT_S
    while host.machine.run_state in (RunState.INMIGRATE, RunState.FINISH_MIGRATE):
        check()
        assert time.monotonic() < end, f"no guest has come: {host.controller.info()}"
        time.sleep(0.01)


def send(host: MachineHost, uri: str) -> None:
    """Migrate, with RAM verified."""
    host.controller.migrate(uri)
    info = host.controller.wait(TIMEOUT_S)
    assert info.status is MigrationStatus.COMPLETED, info.error
    assert info.verified


def check(host: MachineHost) -> None:
    """A guest that stands still has written what it must have, and its time has not gone backwards."""
    ram = host.machine.ram_blocks[0].data
    assert check_ram(ram) == []
    assert read_status_of_ram(ram).backward_steps() == 0


def sections(host: MachineHost) -> dict[str, object]:
    """What a machine that stands still would send of its devices, by section and field, as JSON has it."""
    host.guest.stop_for_migration()
    saved = host.guest.save_devices()
    host.guest.resume()
    plain = {f"{state.name} {state.instance_id}": state.fields for state in saved}
    result: dict[str, object] = json.loads(json.dumps(plain, default=_plain))
    return result


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes | bytearray) else list(value)  # type: ignore[call-overload]


def set_registers(host: MachineHost) -> None:
    """Give a guest that stands still registers that can be told from others."""
    for vcpu in host.machine.hardware.platform.vcpus:
        state = vcpu.get_state()
        state.banked |= {name: value + 0x100 * vcpu.index for name, value in _SIGNIFICANT.items()}
        state.vfp[16:32] = [0x0123_4567_89AB_CD00 + 0x11 * i + vcpu.index for i in range(16)]
        state.fpscr = 0x0300_0000
        vcpu.set_state(state)


def main() -> None:
    """Send two guests, wait for them."""
    first, second = (f"tcp:{OUTER}:{port}" for port in sys.argv[1:])
    waiting = [make("kvm", incoming=True) for _ in PORTS]
    for host, port in zip(waiting, PORTS, strict=True):
        host.controller.incoming(f"tcp:0.0.0.0:{port}")
    running, standing = (make("kvm", kernel="dirtyram", append=DIRTYRAM) for _ in PORTS)
    running.machine.cont()
    wait_for_steps(running)
    send(running, first)
    wait_arrived(waiting[0])
    wait_for_steps(waiting[0])
    waiting[0].machine.stop()
    check(waiting[0])

    standing.machine.cont()
    wait_for_steps(standing)
    standing.machine.stop()
    set_registers(standing)
    print(json.dumps(sections(standing)), flush=True)
    send(standing, second)
    wait_arrived(waiting[1])
    print(json.dumps(sections(waiting[1])), flush=True)
    waiting[1].machine.cont()
    wait_for_steps(waiting[1])
    waiting[1].machine.stop()
    check(waiting[1])
    for host in (*waiting, running, standing):
        host.close()


if __name__ == "__main__":
    main()
