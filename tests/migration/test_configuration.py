"""Machines that do not fit each other: who is told, and that it is in QEMU's words."""

import re
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests.migration.pairs import TCP, hosts, source_guest, waiting_guest
from tests.migration.test_qemu import Qemu, qemu

from sterna.machine.config import MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine
from sterna.migration.controller import MigrationController
from sterna.migration.destination.configuration import configuration_error
from sterna.migration.statistics import MigrationStatus
from sterna.stream import sections
from sterna.stream.return_path import ReturnPathDecoder, shut
from sterna.stream.sections import Configuration
from sterna.stream.wire import Command
from sterna.testing.guest import DoubleGuest

ONE, OTHER = (UUID(int=number * 0x1111_1111_1111_1111_1111_1111_1111_1111) for number in (1, 2))
SECONDS = 300
COMPLETED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.FAILED


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (Configuration("double-1.0"), ""),
        (Configuration("double-1.0", None), ""),
        (Configuration("virt-7.2"), "Machine type received is 'virt-7.2' and local is 'double-1.0'"),
        (Configuration("double-1.0", 14), "Received target_page_bits is 14 but local is 12"),
        (Configuration("double-1.0", 0), "Received target_page_bits is 0 but local is 12"),
        (
            Configuration("double-1.0", capabilities=("x-ignore-shared",)),
            "Capability x-ignore-shared is off, but received capability is on",
        ),
        (Configuration("double-1.0", capabilities=("x-wings",)), "Received unknown capability x-wings"),
        (Configuration("double-1.0", uuid=ONE.bytes), ""),
        (Configuration("double-1.0", uuid=OTHER.bytes), f"UUID received is {OTHER} and local is {ONE}"),
    ],
)
def test_what_a_machine_says(configuration: Configuration, message: str) -> None:
    with DoubleGuest(1, running=False) as guest:
        guest.uuid = ONE.bytes
        found = configuration_error(configuration, guest)
        assert (found.message if found else "") == message


def test_a_machine_without_a_uuid_takes_any(caplog: pytest.LogCaptureFixture) -> None:
    with DoubleGuest(1, running=False) as guest:
        assert configuration_error(Configuration("double-1.0", uuid=ONE.bytes), guest) is None
    assert caplog.messages == [f"UUID is received {ONE}, but local uuid isn't set"]


@pytest.mark.parametrize("validate", [False, True])
def test_uuids_of_two_sternas(validate: bool) -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        here.guest.uuid, there.guest.uuid = ONE.bytes, OTHER.bytes
        here.controller.set_capabilities({"validate-uuid": validate})
        info = here.migrate(there.controller.incoming(TCP))
        if not validate:
            assert info.status is COMPLETED, info.error
            return
        text = f"section 'configuration': UUID received is {ONE} and local is {OTHER}"
        assert info.error == f"destination refused: {text}"
        there.wait_status(FAILED)
        assert there.controller.info().error == text
        assert here.guest.running
        there.guest.uuid = ONE.bytes
        assert here.migrate(there.controller.info().socket_address).status is COMPLETED


def test_a_source_that_does_not_greet_hears_it_on_the_return_path() -> None:
    """As a QEMU does: the return path, and then a section."""
    with hosts(waiting_guest()) as (there,):
        address = there.controller.incoming(TCP)
        host, _, port = address.removeprefix("tcp:").rpartition(":")
        with socket.create_connection((host, int(port)), SECONDS) as source:
            source.sendall(sections.header(Configuration("virt-7.2")))
            source.sendall(sections.command(Command.OPEN_RETURN_PATH))
            source.sendall(sections.section_start(2, "ram", 0, 4))
            decoder = ReturnPathDecoder()
            heard = []
            while data := source.recv(1 << 12):
                heard += decoder.feed(data)
            assert heard == [shut(1)]
        there.wait_status(FAILED)
        assert "Machine type received is 'virt-7.2'" in there.controller.info().error


def test_a_source_that_goes_before_it_could_hear_is_remembered_for_what_it_was() -> None:
    with hosts(waiting_guest()) as (there,):
        address = there.controller.incoming(TCP)
        host, _, port = address.removeprefix("tcp:").rpartition(":")
        with socket.create_connection((host, int(port)), SECONDS) as source:
            source.sendall(sections.header(Configuration("virt-7.2")))
        there.wait_status(FAILED)
        assert "Machine type received is 'virt-7.2'" in there.controller.info().error


def test_a_source_that_cannot_hear_is_cut_off_before_it_could_finish() -> None:
    """It takes a migration for done once all of its bytes are gone."""
    with hosts(waiting_guest()) as (there,):
        address = there.controller.incoming(TCP)
        host, _, port = address.removeprefix("tcp:").rpartition(":")
        with socket.create_connection((host, int(port)), SECONDS) as source:
            source.sendall(
                sections.header(Configuration("virt-7.2")) + sections.section_start(2, "ram", 0, 4)
            )
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                source.sendall(bytes(64 << 20))
        there.wait_status(FAILED)


# -- with a QEMU at the other end ----------------------------------------------------------------------------

MEBIBYTES = 16


@contextmanager
def ours(memory: int = MEBIBYTES, **settings: Any) -> Iterator[tuple[Machine, MigrationController]]:
    machine = Machine(MachineConfig(memory_bytes=memory << 20, **settings))
    with closing(machine), MigrationController(MigratableMachine(machine)) as migration:
        yield machine, migration


def virt(name: str = "virt") -> list[str]:
    return ["-M", name, "-cpu", "cortex-a15", "-nodefaults", "-display", "none"]


def switch_on(peer: Qemu, *names: str) -> None:
    peer.ask(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": True} for name in ("events", *names)],
    )


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("machine", "options", "pattern"),
    [
        ("virt-7.1", [], r"Machine type received is '([^']*)' and local is '([^']*)'"),
        ("virt", ["-m", "32"], r"Size mismatch: mach-virt.ram: (0x\w+) != (0x\w+)"),
        ("virt", ["-uuid", str(OTHER)], r"UUID received is (\S+) and local is ([-\w]+)"),
    ],
    ids=["machine", "memory", "uuid"],
)
def test_both_ends_use_the_same_words(machine: str, options: list[str], pattern: str, tmp_path: Path) -> None:
    """The same two machines, one way and the other: QEMU's log and our error have the same text, turned round."""
    options = options if "-m" in options else ["-m", str(MEBIBYTES), *options]
    settings = {"kernel": "clock", "uuid": ONE}
    with (
        ours(**settings) as (here, migration),
        qemu(tmp_path, *options, "-incoming", "defer", machine=virt(machine)) as peer,
    ):
        migration.set_capabilities({"validate-uuid": True})
        here.cont()
        peer.ask("migrate-incoming", uri=f"unix:{tmp_path}/there")
        migration.migrate(f"unix:{tmp_path}/there")
        info = migration.wait(SECONDS)
        assert info.status is FAILED
        assert here.run_state.value == "running"
        assert "standard error" in info.error
        found = re.search(pattern, peer.wait_end())
        assert found, peer.log.read_text()
    for return_path in (False, True):
        with (
            ours(incoming=True, uuid=ONE) as (_, migration),
            qemu(tmp_path, *options, machine=virt(machine)) as peer,
        ):
            switch_on(peer, "validate-uuid", *(["return-path"] if return_path else []))
            peer.ask("migrate", uri=migration.incoming(f"unix:{tmp_path}/here{return_path}"))
            peer.wait_event("MIGRATION", status="failed")
            info = migration.wait(SECONDS)
            back = re.search(pattern, info.error)
            assert back, info.error
            assert back.groups() == found.groups()[::-1]


@pytest.mark.qemu
def test_a_capability_that_is_only_on_there(tmp_path: Path) -> None:
    with ours(incoming=True) as (_, migration), qemu(tmp_path, "-m", str(MEBIBYTES), machine=virt()) as peer:
        switch_on(peer, "x-ignore-shared")
        peer.ask("migrate", uri=migration.incoming(f"unix:{tmp_path}/here"))
        peer.wait_event("MIGRATION", status="failed")
        assert (
            "Capability x-ignore-shared is off, but received capability is on"
            in migration.wait(SECONDS).error
        )


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("options", "writes", "text"),
    [
        (
            [],
            {0x0901_0010: 1},
            "section 'pl031': Unknown savevm section or instance 'pl031' 0: this machine has no such device, and the guest "
            "may miss it: field 'im' is 1, not 0: the clock's alarm interrupt is enabled",
        ),
        ([], {0x0903_0410: 8}, "section 'pl061': .*field 'im' is 8, not 0"),
        ([], {0x0000_0000: 0x0020_0020}, "section 'pflash_cfi01': .*field 'wcycle' is 1, not 0"),
        (
            ["-device", "virtio-rng-device"],
            {0x0A00_3E70: 1},
            "section 'virtio-mmio@000000000a003e00/virtio-rng': .*virtio device status 0x01",
        ),
        (["-smp", "2"], {}, "the source has a CPU 1, this machine has 1 .set smp to match."),
        (["-M", "virt,secure=on"], {}, 'Unknown ramblock "virt.secure-ram", cannot accept migration'),
        (["-M", "virt,virtualization=on"], {}, "section '(cpu|arm_gic)"),
        (["-cpu", "cortex-a7"], {}, "section 'cpu 0'.*this machine has no place for it"),
    ],
    ids=["alarm", "gpio", "flash", "virtio", "smp", "secure", "el2", "cpu"],
)
def test_what_a_guest_would_miss_keeps_it_in_qemu(
    options: list[str], writes: dict[int, int], text: str, tmp_path: Path
) -> None:
    """Devices that are in use, put into that state as a guest would; QEMU learns it where it has a return path."""
    listening = tmp_path / "qtest"
    arguments = [
        "-m",
        str(MEBIBYTES),
        "-qtest",
        f"unix:{listening},server=on,wait=off",
        "-qtest-log",
        "/dev/null",
    ]
    with ours(incoming=True) as (_, migration), qemu(tmp_path, *arguments, *options, machine=virt()) as peer:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SECONDS)
            connection.connect(str(listening))
            for address, value in writes.items():
                connection.sendall(f"writel {address:#x} {value:#x}\n".encode())
                assert connection.recv(100).startswith(b"OK")
        switch_on(peer, "return-path")
        peer.ask("migrate", uri=migration.incoming(f"unix:{tmp_path}/here"))
        peer.wait_event("MIGRATION", status="failed")
        info = migration.wait(SECONDS)
        assert re.search(text, info.error), info.error


@pytest.mark.qemu
def test_firmware_in_flash_is_refused_and_may_be_ignored(tmp_path: Path) -> None:
    firmware = tmp_path / "firmware"
    firmware.write_bytes(struct.pack("<I", 0xEAFFFFFE) * 2048)
    options = ["-m", str(MEBIBYTES), "-bios", str(firmware)]
    with ours(incoming=True) as (machine, migration):
        address = migration.incoming(f"unix:{tmp_path}/here")
        with qemu(tmp_path, *options, machine=virt()) as peer:
            switch_on(peer, "return-path")
            peer.ask("migrate", uri=address)
            peer.wait_event("MIGRATION", status="failed")
            error = migration.wait(SECONDS).error
            assert (
                "RAM block 'virt.flash0' is not here, and the guest would miss what it holds at 0x0" in error
            )
        migration.set_parameters({"x-sterna-ignore-sections": "virt.flash0"})
        with qemu(tmp_path, *options, machine=virt()) as peer:
            switch_on(peer, "return-path")
            peer.ask("migrate", uri=address)
            peer.wait_event("MIGRATION", status="completed")
            info = migration.wait(SECONDS)
        assert info.status is COMPLETED, info.error
        [flash] = [left for left in info.left_behind if left.ignored]
        assert flash.name == "virt.flash0"
        assert machine.run_state.value == "prelaunch"
