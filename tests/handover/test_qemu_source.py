"""A guest from a QEMU that may go on with it: what the user of a `sterna run` sees, and can do."""

import select
from pathlib import Path

import pytest
from tests.cli.vms import vm, wait_for
from tests.handover.ends import TIMEOUT
from tests.handover.relay import connect

from sterna.machine.config import MachineConfig
from sterna.monitor.protocol import QmpError
from sterna.stream import sections
from sterna.stream.wire import Command

pytestmark = pytest.mark.slow


def stream_of_a_qemu(folder: Path) -> bytes:
    """A stream as a QEMU with return-path sends it."""
    path = folder / "stream"
    with vm(folder, "saved", "--kernel", "clock", "--append", "50", "--serial", "null") as source:
        source.qmp.command("migrate", uri=f"file:{path}")
        wait_for(lambda: source.qmp.command("query-migrate")["status"] == "completed")
    stream, board = path.read_bytes(), MachineConfig(incoming=True).board
    head = sections.header(sections.Configuration(board.machine_type, board.page_bits))
    assert stream.startswith(head)
    return head + sections.command(Command.OPEN_RETURN_PATH) + stream[len(head) :]


def test_a_guest_that_its_qemu_may_have_kept_stays_paused_until_its_user_forces_it(tmp_path: Path) -> None:
    uri, stream = f"unix:{tmp_path}/in", stream_of_a_qemu(tmp_path)
    with vm(tmp_path, "here", "--incoming", uri, "--serial", "null") as here:
        with connect(uri) as connection:
            connection.sendall(stream)
            assert select.select([connection], [], [], TIMEOUT)[0]
        wait_for(lambda: here.qmp.command("query-migrate")["status"] == "failed")
        assert here.qmp.command("query-migrate")["x-sterna"]["in-doubt"]
        assert here.qmp.command("query-status")["status"] == "paused"
        wait_for(lambda: here.errors().endswith("else end this one with 'quit'\n"))  # it waits for no other
        with pytest.raises(QmpError, match="may still run at the QEMU that it came from"):
            here.qmp.command("cont")
        here.qmp.execute("cont", {"x-sterna-force": True})
        assert here.running()
        assert not here.qmp.command("query-migrate")["x-sterna"]["in-doubt"]
