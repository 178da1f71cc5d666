"""Streams that earlier versions wrote: they are understood as they were, and machines take them."""

import json
import socket
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.compatibility.record import CASES, MEMORY
from tests.compatibility.version import COMMITS, ROOT

from sterna.analysis.capture import CHANNEL_FILES, MAIN_FILE
from sterna.launch.process import SternaProcess

pytestmark = pytest.mark.slow

RECORDED = [(version, name) for version in COMMITS for name in CASES]


@pytest.fixture
def capture(version: str, name: str, tmp_path: Path) -> Path:
    """A recorded stream: ``main.stream``, its channels, ``info.json``."""
    with tarfile.open(ROOT / "tests" / "data" / version / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Where something that was told is told otherwise; what is told besides does not matter."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [found for key in before for found in differences(before[key], now.get(key), f"{where}/{key}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            found
            for index, (a, b) in enumerate(zip(before, now, strict=True))
            for found in differences(a, b, f"{where}/{index}")
        ]
    return [] if before == now else [f"{where}: {before} {now}"]


@pytest.mark.parametrize(("version", "name"), RECORDED)
def test_a_stream_is_understood_as_it_was(cli: Any, capture: Path, name: str) -> None:
    code, out, error = cli("stream", "info", "--json", "--digests", str(capture))
    assert code == 0, error
    before = (capture / "info.json").read_text()
    before = before.replace(json.loads(before)["file"], str(capture))
    assert differences(json.loads(before), json.loads(out)) == []


@pytest.mark.parametrize(("version", "name"), RECORDED)
def test_a_machine_takes_it(capture: Path, name: str) -> None:
    case = CASES[name]
    if "kvm" in case.machine and not Path("/dev/kvm").exists():
        pytest.skip("no /dev/kvm")
    arguments = (*case.machine, "--memory", MEMORY, "--incoming", "defer")
    with SternaProcess("destination", arguments) as vm:
        vm.ready()
        for capability in case.capabilities:
            vm.command("migrate-set-capabilities", capabilities=[{"capability": capability, "state": True}])
        vm.command("migrate-set-parameters", **({"x-sterna-verify": "on"} | case.parameters))
        address = f"{capture}/destination"
        vm.command("migrate-incoming", uri=f"unix:{address}")
        with ExitStack() as stack:
            main = stack.enter_context(socket.socket(socket.AF_UNIX))
            main.connect(address)
            main.sendall((capture / MAIN_FILE).read_bytes())
            # It reads none of the channels before all are there.
            senders = stack.enter_context(ThreadPoolExecutor())
            for path in sorted(capture.glob(CHANNEL_FILES)):
                channel = stack.enter_context(socket.socket(socket.AF_UNIX))
                channel.connect(address)
                senders.submit(channel.sendall, path.read_bytes())
            while main.recv(1 << 16):  # what it answers, until it is done
                pass
        info = vm.command("query-migrate")
        assert (info["status"], info["x-sterna"]["verified"]) == ("completed", True)
        assert vm.command("query-status")["status"] == "running"
