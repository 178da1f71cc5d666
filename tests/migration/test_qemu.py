"""QEMU on the other end: a paused machine goes from QEMU to a double and on to another QEMU."""

import json
import socket
import subprocess
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.migration.pairs import hosts
from tests.needs import qemu_program
from tests.savedstream import saved, saving

from sterna.memory.bitmap import DirtyBatch, new_bitmap
from sterna.memory.ram import RamBlock
from sterna.migration.controller import MigrationController
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import Ownership, OwnershipState
from sterna.stream.description import Descriptions, find_description
from sterna.stream.ram.setup import read_setup
from sterna.stream.reader import SectionPiece, StreamReader
from sterna.stream.sections import Configuration
from sterna.stream.unmatched import Judgement, RamUse
from sterna.stream.vmstate import DeviceState
from sterna.testing.guest import DoubleGuest

pytestmark = pytest.mark.qemu
MACHINE = ["-M", "virt", "-cpu", "cortex-a15", "-nodefaults", "-display", "none"]
RAM = 0x4000_0000


class Qemu:
    """A QEMU and its QMP connection.

    :ivar log: the file that it writes errors to
    """

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self.log = log
        assert process.stdout is not None
        assert process.stdin is not None
        self._read, self._write = process.stdout, process.stdin
        self.events: list[dict[str, Any]] = []
        assert "QMP" in json.loads(self._read.readline())
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        self._write.write(request.encode() + b"\n")
        self._write.flush()
        while "event" in (reply := json.loads(self._read.readline())):
            self.events.append(reply)
        assert "return" in reply, reply
        return reply["return"]

    def kill(self) -> None:
        """As a host that loses its power does."""
        self._process.kill()
        self._process.wait()

    def wait_end(self) -> str:
        """Wait until it has ended by itself.

        :return: what it wrote to its log
        """
        self._process.wait(300)
        return self.log.read_text()

    def wait_event(self, name: str, **data: object) -> None:
        while True:
            for event in self.events:
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return
            line = self._read.readline()
            assert line, "QEMU has ended"
            self.events.append(json.loads(line))


@contextmanager
def qemu(path: Path, *arguments: str, machine: Sequence[str] = MACHINE) -> Iterator[Qemu]:
    """A stopped QEMU.

    :param path: directory for its log
    :param machine: its first arguments
    """
    command = [qemu_program(), *machine, "-S", "-qmp", "stdio", *arguments]
    log = path / f"qemu{len(list(path.glob('qemu*.log')))}.log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        # Whoever waits for what does not come reads the end of its output instead.
        patience = threading.Timer(600, process.kill)
        patience.start()
        try:
            yield Qemu(process, log)
        finally:
            patience.cancel()
            patience.join()
            process.kill()


class Carrier:
    """A guest that never runs: it keeps what a QEMU sent, to send it on."""

    def __init__(self, stream: bytes) -> None:
        """:param stream: of the machine that will come, to learn its RAM blocks and devices from"""

        class Source:
            at = 0

            def readinto(self, buffer: memoryview, /) -> int:
                piece = stream[self.at : self.at + len(buffer)]
                buffer[: len(piece)] = piece
                self.at += len(piece)
                return len(piece)

        reader = StreamReader(Source())
        configuration = reader.next()
        assert isinstance(configuration, Configuration)
        assert isinstance(reader.next(), SectionPiece)
        self.machine_type = configuration.machine
        self.page_bits = configuration.page_bits
        self.uuid = None
        setup = read_setup(reader, configuration.page_bits or 10)
        self.ram_blocks = tuple(RamBlock(name, size) for name, size in setup)
        text = find_description(stream)
        assert text is not None
        found = Descriptions(text)
        self.descriptions = {name: found[name, instance] for name, instance in found}
        self.states: Sequence[DeviceState] = ()
        self.ownership = Ownership(OwnershipState.ABSENT)
        self.resumed = 0
        self.away = False

    def check_migratable(self) -> None:
        pass

    def start_dirty_logging(self) -> None:
        pass

    def stop_dirty_logging(self) -> None:
        pass

    def harvest(self) -> list[DirtyBatch]:
        return [DirtyBatch(block.name, new_bitmap(block.pages)) for block in self.ram_blocks]

    def stop_for_migration(self) -> int:
        return 1

    def resume(self) -> int:
        self.resumed += 1
        return 1

    def migrated_away(self) -> None:
        self.away = True

    def save_devices(self) -> list[DeviceState]:
        return list(self.states)

    def judge_section(self, state: DeviceState) -> Judgement:
        raise AssertionError("it has all of the source's devices")

    def judge_ram_block(self, name: str, size: int) -> RamUse | None:
        raise AssertionError("it has all of the source's RAM")

    def load_devices(self, states: Sequence[DeviceState], ignored: Collection[str] = ()) -> None:
        self.states = states

    def announce(self, delays: Sequence[float]) -> None:
        self.announced = list(delays)

    def advance_counter(self, elapsed_ns: int) -> None:
        pass

    def close(self) -> None:
        for block in self.ram_blocks:
            block.close()


@pytest.mark.parametrize("return_path", [False, True])
def test_from_qemu_and_on_to_qemu(return_path: bool, tmp_path: Path) -> None:
    with qemu(tmp_path, "-m", "64") as first:
        first.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        first.ask("migrate", uri=saving(tmp_path / "stream"))
        first.wait_event("MIGRATION", status="completed")
    guest = Carrier(saved(tmp_path / "stream"))
    pattern = np.random.default_rng(3).integers(0, 256, 4 << 20, dtype=np.uint8)
    with MigrationController(guest) as controller:
        address = controller.incoming(f"unix:{tmp_path}/in")
        with qemu(tmp_path, "-m", "64") as second:
            second.ask(
                "migrate-set-capabilities",
                capabilities=[
                    {"capability": "events", "state": True},
                    {"capability": "return-path", "state": return_path},
                ],
            )
            second.ask("migrate", uri=address)
            second.wait_event("MIGRATION", status="completed")
        info = controller.wait(300)
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert guest.resumed == 1
        main = next(block for block in guest.ram_blocks if block.name == "mach-virt.ram")
        main.data[8 << 20 : 12 << 20] = pattern
        with qemu(tmp_path, "-m", "64", "-incoming", "defer") as third:
            third.ask("migrate-incoming", uri=f"unix:{tmp_path}/out")
            controller.migrate(f"unix:{tmp_path}/out")
            info = controller.wait(300)
            assert (info.status, info.peer) == (MigrationStatus.COMPLETED, "qemu"), info.error
            assert guest.away
            assert info.verified is None
            third.ask("pmemsave", val=RAM + (8 << 20), size=4 << 20, filename=f"{tmp_path}/memory")
            assert (tmp_path / "memory").read_bytes() == pattern.tobytes()
    guest.close()


def test_a_qemu_that_refuses_gives_the_guest_back(tmp_path: Path) -> None:
    guest = DoubleGuest(64)
    with hosts(guest) as (here,), qemu(tmp_path, "-m", "64", "-incoming", "defer") as peer:
        peer.ask("migrate-incoming", uri=f"unix:{tmp_path}/in")
        info = here.migrate(f"unix:{tmp_path}/in")
        assert info.status is MigrationStatus.FAILED
        assert f"unix:{tmp_path}/in" in info.error
        assert guest.running
        assert not guest.logging


def test_verification_cannot_be_forced_on_a_qemu(tmp_path: Path) -> None:
    guest = DoubleGuest(64)
    with hosts(guest) as (here,), socket.create_server(("127.0.0.1", 0)) as server:
        here.controller.set_parameters({"x-sterna-verify": "on"})
        here.controller.migrate(f"tcp:127.0.0.1:{server.getsockname()[1]}")
        peer, _ = server.accept()
        with peer:
            peer.sendall(bytes.fromhex("0002 0004 53544e41"))
            info = here.outcome()
        assert "the destination cannot verify: it is not a sterna" in info.error
        assert guest.running
