"""ARMv7 guests cross between KVM, on the emulated arm64 host, and the emulated hypervisor, here."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.arm64 import crossing
from tests.migration.pairs import TCP, Host
from tests.ports import held_port

from sterna.machine.runstate import RunState

pytestmark = [pytest.mark.arm64host, pytest.mark.qemu, pytest.mark.slow]


@pytest.fixture
def emulated() -> Iterator[list[Host]]:
    hosts = [crossing.make("emulated", incoming=True) for _ in crossing.PORTS]
    yield hosts
    for host in hosts:
        host.close()


@pytest.fixture
def ports() -> Iterator[list[int]]:
    """Ports for the host."""
    with ExitStack() as stack:
        yield [stack.enter_context(held_port()) for _ in crossing.PORTS]


def test_guests_cross_from_kvm_to_the_emulated_hypervisor_and_back(in_arm64_host, emulated, ports) -> None:
    arriving = [host.controller.incoming(TCP).rpartition(":")[2] for host in emulated]
    forwards = tuple(zip(ports, crossing.PORTS, strict=True))
    said: list[tuple[int, str]] = []
    command = ("python3", "-m", "tests.arm64.crossing", *arriving)
    there = threading.Thread(target=lambda: said.append(in_arm64_host(*command, forwards=forwards)))
    there.start()

    def goes_on() -> None:
        assert not said, said

    try:
        running, standing = emulated
        crossing.wait_arrived(running, goes_on)
        crossing.wait_for_steps(running)
        crossing.send(running, f"tcp:127.0.0.1:{ports[0]}")
        assert running.machine.run_state is RunState.POSTMIGRATE
        crossing.check(running)

        crossing.wait_arrived(standing, goes_on)
        assert standing.machine.run_state is RunState.PAUSED
        here = crossing.sections(standing)
        crossing.check(standing)
        crossing.send(standing, f"tcp:127.0.0.1:{ports[1]}")
    finally:
        there.join()
    code, output = said[0]
    assert code == 0, output[-4000:]
    before, after = map(json.loads, output.splitlines())
    for name in sorted({*before, *here, *after}):
        assert here[name] == before[name], name
        assert after[name] == before[name], name
