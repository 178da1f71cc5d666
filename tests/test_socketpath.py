"""A path that a socket was bound to is removed by whoever made it, and nothing that came after."""

import os
import socket
from pathlib import Path

import pytest

from sterna.machine.serial import open_serial
from sterna.migration.channels.unix import UnixUri
from sterna.monitor.addresses import parse_address
from sterna.monitor.server import Listening

MAKERS = {
    "migration": lambda path: UnixUri(path).listen(),
    "monitor": lambda path: Listening.on(parse_address(f"unix:{path},server")),
    "serial": lambda path: open_serial(f"unix:{path}"),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_its_own_path_is_removed_and_no_other(maker, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    maker(str(path)).close()
    assert not path.exists()
    made = maker(str(path))
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
        made.close()
        assert path.is_socket(), "another process listens there by now"
    path.unlink()
    made = maker(str(path))
    os.unlink(path)
    path.write_text("a file")
    made.close()
    assert path.read_text() == "a file"
    path.unlink()
    made = maker(str(path))
    os.unlink(path)
    made.close()
