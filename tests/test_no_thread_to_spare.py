"""What opens descriptors or starts processes, and then cannot have its thread, leaves nothing behind."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tests.cli.vms import children
from tests.machine.virtiodriver import MAC, SocketNetwork
from tests.refusal import refuse_threads

from sterna.launch.console import Console
from sterna.launch.errors import VmError
from sterna.launch.host import LOCAL
from sterna.launch.process import SternaProcess
from sterna.machine.serial import open_serial
from sterna.machine.virtio.device import Port
from sterna.machine.virtio.net import VirtioNet
from sterna.testbed.auditingproxy import AuditingProxy
from sterna.testbed.errors import BedError
from sterna.testbed.probes import Session
from sterna.testbed.session import SshSession

SSH = """#!/bin/sh
exec sleep 1000
"""
REFUSED = "can't start new thread"


def make_card(directory: Path) -> object:
    return VirtioNet(SocketNetwork(), MAC, Port(0, None, lambda level: None))  # type: ignore[arg-type]


def make_ssh(directory: Path) -> object:
    return SshSession(LOCAL, "127.0.0.1", directory / "key", "a key", directory)


MAKERS: dict[str, tuple[type[Exception], Callable[[Path], object]]] = {
    "virtio-net": (RuntimeError, make_card),
    "serial-out": (RuntimeError, lambda directory: open_serial(f"file:{directory}/output")),
    "console": (RuntimeError, lambda directory: Console()),
    "probe": (BedError, lambda directory: Session(LOCAL, "127.0.0.1", time.monotonic)),
    "ssh": (BedError, make_ssh),
    "forwarder": (BedError, lambda directory: AuditingProxy(LOCAL, "tcp:127.0.0.1:1")),
}


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_stays_open(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    error, make = MAKERS[name]
    before = remains()
    refuse_threads(monkeypatch, name)
    with pytest.raises(error, match=REFUSED):
        make(tmp_path)
    assert not remains() - before


def test_a_vm_whose_console_cannot_be_read_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    before = remains()
    refuse_threads(monkeypatch, "console")
    with pytest.raises(VmError, match=f"cannot start the source: {REFUSED}"):
        SternaProcess("source", [])
    assert not remains() - before


def test_a_forwarder_whose_proxy_cannot_accept_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    before = remains()
    refuse_threads(monkeypatch, "proxy-accept")
    proxy = AuditingProxy(LOCAL, "tcp:127.0.0.1:1")
    with pytest.raises(BedError, match=REFUSED):
        proxy.compare("ram", 0, 0)
    assert not remains() - before


def remains() -> Counter[object]:
    """What is behind open descriptors, processes and threads. Those of tests before may still be ending."""
    found: Counter[object] = Counter([*children(os.getpid()), *threading.enumerate()])
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # as is the one that lists them
            found[os.readlink(f"/proc/self/fd/{descriptor}")] += 1
    return found
