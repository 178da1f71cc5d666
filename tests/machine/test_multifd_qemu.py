"""A running guest moves to a real QEMU on several channels, and goes on there; with nobody to agree, it goes on here."""

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.clockguest import last_sequence
from tests.machine.test_machine_qemu import SECONDS, Console
from tests.restless import Restless

from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine
from sterna.machine.runstate import RunState
from sterna.migration.controller import MigrationController

pytestmark = pytest.mark.qemu
MEMORY = 64 << 20
RAM = 0x4000_0000


class Qemu:
    """A QEMU that has been started paused: its monitor, and what its guest prints."""

    def __init__(self, process: "subprocess.Popen[bytes]", monitor: socket.socket) -> None:
        self.console = Console(process)
        self._process = process
        self._file = monitor.makefile("rwb")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while "event" in (reply := json.loads(self._file.readline())):
            pass
        assert "return" in reply, reply
        return reply["return"]

    def wait_loaded(self) -> None:
        end = time.monotonic() + SECONDS
        while self("query-status")["status"] != "paused":
            assert time.monotonic() < end
            assert self._process.poll() is None


@contextmanager
def destination(qemu: str, path: Path, *, multifd: dict[str, object] | None) -> Iterator[Qemu]:
    """A QEMU that waits for a guest at ``unix:PATH/in``."""
    command = [
        qemu,
        "-M",
        "virt",
        "-cpu",
        "cortex-a15",
        "-m",
        str(MEMORY >> 20),
        "-smp",
        "2",
        "-nodefaults",
        "-S",
    ]
    command += ["-display", "none", "-serial", "stdio", "-qmp", f"unix:{path}/qmp", "-incoming", "defer"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}/qmp")
        listener.listen()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            listener.settimeout(SECONDS)
            with listener.accept()[0] as monitor:
                monitor.settimeout(SECONDS)
                peer = Qemu(process, monitor)
                if multifd is not None:
                    peer("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
                    peer("migrate-set-parameters", **multifd)
                peer("migrate-incoming", uri=f"unix:{path}/in")
                yield peer
        finally:
            process.kill()
            process.wait(SECONDS)
            assert process.stdout is not None
            process.stdout.close()


def dirtying(make_machine: Callable[..., Machine]) -> Machine:
    """A guest that writes all the time, and whose memory has all of: zeros, words, what does not compress."""
    source = make_machine(kernel="random", append="5 2048", smp=2, memory_bytes=MEMORY)
    source.cont()
    assert source.serial.wait_for(b"filled", SECONDS)
    return source


@pytest.mark.parametrize(
    ("channels", "compression"),
    [(1, "none"), (2, "none"), (4, "none"), (2, "zlib"), (1, "zstd"), (4, "zstd")],
)
def test_every_page_arrives(
    qemu: str, make_machine: Callable[..., Machine], tmp_path: Path, channels: int, compression: str
) -> None:
    settings = {"multifd-channels": channels, "multifd-compression": compression}
    source = dirtying(make_machine)
    with (
        destination(qemu, tmp_path, multifd=settings) as peer,
        MigrationController(Restless(source)) as migration,
    ):
        migration.set_capabilities({"multifd": True})
        migration.set_parameters(
            {**settings, "max-bandwidth": 32 << 20, "downtime-limit": 0, "x-sterna-max-throttle": 0}
        )
        migration.migrate(f"unix:{tmp_path}/in")
        while (info := migration.wait(0.01)).pass_number < 3:
            # Pages are sent again while the guest writes them.
            assert info.status.running, info.error
        migration.set_parameters({"downtime-limit": 2000})
        info = migration.wait(SECONDS)
        assert (info.status.value, info.peer) == ("completed", "qemu"), info.error
        assert info.multifd_bytes > 0
        peer.wait_loaded()
        peer("pmemsave", val=RAM, size=MEMORY, filename=f"{tmp_path}/memory")
        ours = next(block for block in source.ram_blocks if block.size == MEMORY)
        assert (tmp_path / "memory").read_bytes() == ours.data.tobytes()


def test_the_guest_goes_on(qemu: str, make_machine: Callable[..., Machine], tmp_path: Path) -> None:
    source = make_machine(kernel="clock", append="20", smp=2, memory_bytes=MEMORY)
    source.cont()
    assert source.serial.wait_for(b"seq 3 ", SECONDS)
    settings = {"multifd-channels": 3, "multifd-compression": "zstd"}
    with (
        destination(qemu, tmp_path, multifd=settings) as peer,
        MigrationController(MigratableMachine(source)) as migration,
    ):
        migration.set_capabilities({"multifd": True})
        migration.set_parameters(settings)
        migration.migrate(f"unix:{tmp_path}/in")
        info = migration.wait(SECONDS)
        assert info.status.value == "completed", info.error
        assert source.run_state is RunState.POSTMIGRATE
        peer.wait_loaded()
        peer("cont")
        sequence = last_sequence(bytes(source.serial.output))
        peer.console.wait_for(f"seq {sequence + 5} ".encode())
        assert b"backward 0" in peer.console.text


@pytest.mark.parametrize("here", [True, False])
def test_a_qemu_that_does_not_agree_leaves_the_guest_here(
    qemu: str,
    make_machine: Callable[..., Machine],
    tmp_path: Path,
    here: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not here:  # a QEMU with multifd waits for its channels and answers nothing before
        monkeypatch.setattr("sterna.migration.peer.GREETING_SECONDS", 1.0)
    source = dirtying(make_machine)
    with (
        destination(qemu, tmp_path, multifd=None if here else {"multifd-channels": 2}),
        MigrationController(MigratableMachine(source)) as migration,
    ):
        migration.set_capabilities({"multifd": here})
        migration.migrate(f"unix:{tmp_path}/in")
        info = migration.wait(SECONDS)
        assert info.status.value == "failed"
        assert "multifd" in info.error if here else "did not answer" in info.error, info.error
        assert source.run_state is RunState.RUNNING


def test_a_qemu_with_another_compression_leaves_the_guest_here(
    qemu: str, make_machine: Callable[..., Machine], tmp_path: Path
) -> None:
    source = dirtying(make_machine)
    settings = {"multifd-channels": 2, "multifd-compression": "zlib"}
    with (
        destination(qemu, tmp_path, multifd=settings),
        MigrationController(MigratableMachine(source)) as migration,
    ):
        migration.set_capabilities({"multifd": True})
        migration.set_parameters({"multifd-compression": "none"})
        migration.migrate(f"unix:{tmp_path}/in")
        info = migration.wait(SECONDS)
        assert info.status.value == "failed"
        assert "multifd channel" in info.error or "closed the connection" in info.error, info.error
        assert source.run_state is RunState.RUNNING
