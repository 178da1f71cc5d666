"""Live migrations of guests that run on the host's own CPU."""

import resource
import time
from pathlib import Path

import pytest
from tests.migration.machinehost import MachineHost
from tests.migration.pairs import TCP

from sterna.guests.check import check_ram
from sterna.guests.layout import DirtyramWord, StatusError, read_status_of_ram
from sterna.hypervisor.interface import DirtyLogMode
from sterna.jit.ahead import fetch_kernels
from sterna.launch.process import SternaProcess
from sterna.machine.config import MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.runstate import RunState
from sterna.migration.statistics import MigrationStatus
from sterna.testing.conformance.backends import KvmX86

pytestmark = [pytest.mark.kvm, pytest.mark.slow]

COMPLETED, CANCELLED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.CANCELLED, MigrationStatus.FAILED
TIMEOUT_S = 300
LITTLE = 15 << 20
"""Memory for one thread more, and not for two, whose stacks have 8 MiB each; what is left of it serves all else."""


@pytest.fixture
def make():
    """Hosts with a machine each."""
    if why := KvmX86().missing():
        pytest.skip(why)
    fetch_kernels()  # they may have to be compiled, which takes longer than a test waits
    made = []

    def make(**settings):
        machine = Machine(MachineConfig(accel="kvm", **{"memory_bytes": 64 << 20} | settings))
        made.append(MachineHost(machine))
        return made[-1]

    yield make
    for host in made:
        host.close()


def running(make, append="8000 800 1", **settings):
    host = make(kernel="dirtyram", append=append, **settings)
    host.machine.cont()
    wait_for(host, lambda s: all(s.word(cpu, DirtyramWord.PASSES) for cpu in range(s.cpus)))
    return host


def wait_for(host, condition):
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            status = read_status_of_ram(host.machine.ram_blocks[0].data)
            if status.steps() and condition(status):
                return
        except StatusError:
            pass  # it has not come that far
        assert host.machine.run_state is RunState.RUNNING, host.machine.error
        assert time.monotonic() < end
        time.sleep(0.001)


def goes_on(host):
    """The guest runs here, and its memory is what it must have written."""
    steps = read_status_of_ram(host.machine.ram_blocks[0].data).steps()
    wait_for(host, lambda s: s.steps() > steps + 3)
    host.machine.stop()
    assert check_ram(host.machine.ram_blocks[0].data) == []
    host.machine.cont()


@pytest.mark.parametrize("mode", list(DirtyLogMode))
@pytest.mark.parametrize("smp", [1, 4])
def test_a_running_guest_moves_there_and_back(make, mode, smp):
    here = running(make, smp=smp, dirty_log=mode)
    there = make(smp=smp, dirty_log=mode, incoming=True)
    home = make(smp=smp, incoming=True)
    for source, destination in ((here, there), (there, home)):
        info = source.migrate(destination.controller.incoming(TCP))
        assert info.status is COMPLETED, info.error
        assert info.verified
        assert source.machine.run_state is RunState.POSTMIGRATE
        goes_on(destination)


@pytest.mark.parametrize("mode", list(DirtyLogMode))
def test_a_cancelled_migration_leaves_no_trace(make, mode):
    here = running(make, append="8000 8000 0", dirty_log=mode)
    there = make(incoming=True)
    blocks = here.machine.statistics()["blocks_2m"]
    # Whole pages, so that each pass takes more than a second, and none is the last.
    here.controller.set_capabilities({"xbzrle": False})
    here.controller.set_parameters(
        {"max-bandwidth": 20 << 20, "downtime-limit": 0, "x-sterna-max-throttle": 0}
    )
    address = there.controller.incoming(TCP)
    here.controller.migrate(address)
    here.wait_pass(2)
    here.controller.cancel()
    assert here.outcome().status is CANCELLED
    goes_on(here)
    end = time.monotonic() + TIMEOUT_S
    while here.machine.statistics()["blocks_2m"] < blocks:
        assert time.monotonic() < end, "blocks that do not come back"
        time.sleep(0.01)
    here.controller.set_parameters({"max-bandwidth": 0, "downtime-limit": 300, "x-sterna-max-throttle": 99})
    here.controller.set_capabilities({"auto-converge": True, "xbzrle": None})
    assert here.migrate(address).status is COMPLETED
    goes_on(there)


def test_a_destination_that_goes_away_leaves_the_guest_here(make):
    here = running(make)
    there = make(incoming=True)
    # Whole pages, so that the first pass takes half a minute.
    here.controller.set_capabilities({"xbzrle": False})
    here.controller.set_parameters({"max-bandwidth": 1 << 20})
    here.controller.migrate(there.controller.incoming(TCP))
    here.wait_pass(1)
    there.controller.close()
    assert here.outcome().status is FAILED
    goes_on(here)


def test_a_guest_that_dirties_faster_than_it_is_sent_is_throttled(make):
    here = running(make, append="6000 6000 0", smp=2)
    there = make(smp=2, incoming=True)
    # Its 24 MB, sent whole, fit this limit on no link: pacing does not count for the last pass.
    here.controller.set_parameters({"max-bandwidth": 80 << 20, "downtime-limit": 20})
    here.controller.set_capabilities({"auto-converge": True, "xbzrle": False})
    info = here.migrate(there.controller.incoming(TCP))
    assert info.status is COMPLETED, info.error
    assert any(record.throttle_percent for record in info.passes), info.passes
    goes_on(there)


def test_a_destination_that_runs_out_of_memory_leaves_the_guest_here(make):
    """And takes it once it has memory."""
    here = running(make)
    with SternaProcess("destination", ["--accel", "kvm", "--memory", "64M", "--incoming", "defer"]) as there:
        there.ready(lambda: None)
        there.command("migrate-incoming", uri="tcp:127.0.0.1:0")
        uri = there.incoming_uri()
        status = Path(f"/proc/{there.pid}/status").read_text()
        size = int(status.partition("VmSize:")[2].split()[0]) << 10
        before = resource.prlimit(there.pid, resource.RLIMIT_AS, (size + LITTLE, resource.RLIM_INFINITY))
        info = here.migrate(uri)
        assert info.status is FAILED
        assert there.command("query-status")["status"] == "inmigrate"
        goes_on(here)
        resource.prlimit(there.pid, resource.RLIMIT_AS, before)
        info = here.migrate(uri)
        assert info.status is COMPLETED, info.error
        assert there.command("query-status")["running"]


def test_a_destination_with_another_cpu_is_refused_while_the_guest_runs(make, monkeypatch):
    here = running(make)
    there = make(incoming=True)
    host = dict(there.guest.host_traits())
    host["CPUID 0x1 EDX"] &= ~(1 << 26)
    monkeypatch.setattr(there.guest, "host_traits", lambda: host)
    stopped = []
    here.machine.subscribe(lambda name, data: stopped.append(name))
    info = here.migrate(there.controller.incoming(TCP))
    assert info.status is FAILED
    assert info.error.endswith("cannot run this guest: CPUID 0x1 EDX: it lacks bits 0x4000000")
    assert stopped == []
    goes_on(here)
