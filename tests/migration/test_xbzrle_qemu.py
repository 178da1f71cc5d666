"""XBZRLE live, with a QEMU at the other end."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tests.migration.test_qemu import RAM, Carrier, qemu
from tests.restless import Restless
from tests.savedstream import saved, saving
from tests.stream.test_qemu_streams import BOARDS
from tests.stream.test_xbzrle_qemu import PAGES, PASSES, SLOW, Debugger, disturb, disturb_passes

from sterna.machine.config import MachineConfig
from sterna.machine.machine import Machine
from sterna.migration.controller import MigrationController
from sterna.migration.statistics import MigrationStatus

pytestmark = pytest.mark.qemu

XBZRLE = [{"capability": "xbzrle", "state": True}, {"capability": "events", "state": True}]
SECONDS = 300


def wait_passes(migration: MigrationController, count: int) -> None:
    while (info := migration.wait(0.01)).pass_number < count:
        assert info.status.running, info.error


def test_a_running_guest_moves_to_qemu(tmp_path: Path) -> None:
    config = MachineConfig(memory_bytes=64 << 20, kernel="random", append="3 2048 20", serial="memory")
    machine = Machine(config)
    with closing(machine), qemu(tmp_path, "-m", "64", "-incoming", "defer") as peer:
        machine.cont()
        assert machine.serial.wait_for(b"filled", SECONDS)  # type: ignore[attr-defined]
        peer.ask("migrate-set-capabilities", capabilities=XBZRLE)
        peer.ask("migrate-incoming", uri=f"unix:{tmp_path}/in")
        with MigrationController(Restless(machine)) as migration:
            migration.set_capabilities({"xbzrle": True})
            migration.set_parameters(
                {"max-bandwidth": 16 << 20, "downtime-limit": 0, "x-sterna-max-throttle": 0}
            )
            migration.migrate(f"unix:{tmp_path}/in")
            wait_passes(migration, PASSES)
            migration.set_parameters({"max-bandwidth": 0, "downtime-limit": 1000})
            info = migration.wait(SECONDS)
            assert info.status is MigrationStatus.COMPLETED, info.error
        assert info.xbzrle is not None
        assert info.xbzrle.pages > 100
        (ram,) = (block for block in machine.ram_blocks if block.name == "mach-virt.ram")
        peer.ask("pmemsave", val=RAM, size=ram.size, filename=f"{tmp_path}/ram")
        theirs = np.frombuffer((tmp_path / "ram").read_bytes(), dtype=np.uint8)
        different = np.unique(np.flatnonzero(theirs != ram.data) >> 12)
        assert not different.size, different[:8]


def test_qemus_changes_arrive(tmp_path: Path) -> None:
    """A paused QEMU whose memory is written by its GDB stub, as `stream.test_xbzrle_qemu` explains."""
    board = BOARDS[0]
    rng = np.random.default_rng(8)
    with qemu(tmp_path, "-m", "16") as first:
        first.ask("migrate-set-capabilities", capabilities=XBZRLE)
        first.ask("migrate", uri=saving(tmp_path / "stream"))
        first.wait_event("MIGRATION", status="completed")
    guest = Carrier(saved(tmp_path / "stream"))
    with closing(guest), MigrationController(guest) as migration:
        address = migration.incoming(f"unix:{tmp_path}/in")
        with (
            qemu(tmp_path, "-m", "16", "-gdb", f"unix:{tmp_path}/gdb,server=on,wait=off") as source,
            closing(Debugger(tmp_path / "gdb")) as debugger,
        ):
            for number in range(PAGES):
                disturb(debugger, board, rng, number)
            source.ask("migrate-set-capabilities", capabilities=XBZRLE)
            source.ask("migrate-set-parameters", **{"max-bandwidth": SLOW, "downtime-limit": 1})
            source.ask("migrate", uri=address)
            disturb_passes(source.ask, debugger, board, rng)
            source.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            source.wait_event("MIGRATION", status="completed")
            assert source.ask("query-migrate")["xbzrle-cache"]["bytes"] > 0
            info = migration.wait(SECONDS)
            assert info.status is MigrationStatus.COMPLETED, info.error
            (ram,) = (block for block in guest.ram_blocks if block.name == "mach-virt.ram")
            source.ask("pmemsave", val=RAM, size=ram.size, filename=f"{tmp_path}/ram")
        assert (tmp_path / "ram").read_bytes() == ram.data.tobytes()
