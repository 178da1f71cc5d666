"""A path that a socket was bound to is removed by whoever made it, and nothing else that is there before or after."""

import os
import socket
from pathlib import Path

import pytest

from sterna.machine.serial import open_serial
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.unix import UnixUri
from sterna.monitor.addresses import connect, listen, parse_address

MAKERS = {
    "migration": lambda path: UnixUri(path).listen(),
    "monitor": lambda path: listen(parse_address(f"unix:{path},server")),
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


def fifo(path: Path) -> None:
    os.mkfifo(path)


OTHERS = {"directory": Path.mkdir, "regular file": Path.touch, "pipe": fifo}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_socket_is_named_and_kept(maker, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    OTHERS[kind](path)
    inode = path.stat().st_ino
    with pytest.raises(Exception, match=f"other: it is a {kind}, not a socket$"):
        maker(str(path))
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_socket_that_nobody_listens_on_is_replaced(maker, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    maker(str(path)).close()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
        another.listen()
        with pytest.raises(Exception, match=r"(?i)address already in use"):
            maker(str(path))
        assert path.is_socket()


CONNECTORS = {
    "migration": lambda path: UnixUri(path).connect(Cancellation()),
    "monitor": lambda path: connect(parse_address(f"unix:{path}")),
}


@pytest.mark.parametrize("connector", CONNECTORS.values(), ids=CONNECTORS)
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_socket_refuses_nobody(connector, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    OTHERS[kind](path)
    with pytest.raises(Exception, match=f"^cannot connect to unix:{path}: it is a {kind}, not a socket$"):
        connector(str(path))
