"""The same requests to a real QEMU 7.2 and to ours: errors, types and names agree."""

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.monitor.machines import monitored
from tests.monitor.qmpserver import TIMEOUT

from sterna.monitor.addresses import AddressError, parse_address
from sterna.monitor.client import QmpClient
from sterna.monitor.protocol import QmpError

MACHINE = ["-M", "virt", "-cpu", "cortex-a15", "-m", "64M", "-name", "tested"]
MACHINE += ["-display", "none", "-S", "-nodefaults"]


@pytest.fixture
def peer(qemu: str, tmp_path: Path) -> Iterator[QmpClient]:
    """The monitor of a QEMU that waits to be started."""
    address = parse_address(f"unix:{tmp_path}/qemu.qmp")
    # wait=on makes it listen and then stop until somebody connects.
    monitor = ["-qmp", f"unix:{address.path},server,wait=on"]
    process = subprocess.Popen([qemu, *MACHINE, *monitor], stderr=subprocess.DEVNULL)
    try:
        with connect(address, process) as client:
            yield client
    finally:
        process.kill()
        process.wait(TIMEOUT)


def connect(address: Any, process: "subprocess.Popen[bytes]") -> QmpClient:
    pause = threading.Event()
    while process.poll() is None:
        try:
            return QmpClient.connect(address, TIMEOUT)
        except AddressError:
            pause.wait(0.01)  # it does not listen yet
    raise AssertionError("QEMU has ended")


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[QmpClient]:
    with monitored(tmp_path / "ours") as vm, vm.server.client() as client:
        yield client


def outcome(client: QmpClient, command: str, arguments: Any) -> Any:
    try:
        return "return", client.execute(command, arguments)
    except QmpError as error:
        return error.error_class, error.desc


SAME_ANSWER: list[tuple[str, dict[str, Any]]] = [
    ("nope", {}),
    ("stop", {"a": 1}),
    ("query-status", {}),
    ("query-name", {}),
    ("query-uuid", {}),
    ("query-kvm", {}),
    ("query-migrate", {}),
    ("migrate", {}),
    ("migrate", {"uri": 5}),
    ("migrate", {"uri": "tcp:127.0.0.1:1", "zzz": 1}),
    ("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}),
    ("migrate-set-capabilities", {}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "foo", "state": True}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "xbzrle", "state": 1}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "xbzrle"}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "xbzrle", "state": False, "x": 1}]}),
    ("migrate-set-parameters", {"foo": 1}),
    ("migrate-set-parameters", {"max-bandwidth": 1000, "downtime-limit": 10}),
    ("migrate_cancel", {}),
    ("human-monitor-command", {}),
    ("human-monitor-command", {"command-line": "info status"}),
    ("human-monitor-command", {"command-line": "foo"}),
    ("human-monitor-command", {"command-line": "info foo"}),
    ("human-monitor-command", {"command-line": "migrate"}),
    ("human-monitor-command", {"command-line": "migrate -x a"}),
    ("human-monitor-command", {"command-line": "migrate_set_parameter foo 1"}),
    ("human-monitor-command", {"command-line": "migrate_set_parameter max-bandwidth zz"}),
    ("human-monitor-command", {"command-line": "migrate_set_capability foo on"}),
    ("human-monitor-command", {"command-line": "migrate_set_capability xbzrle maybe"}),
    ("human-monitor-command", {"command-line": "stop 3"}),
    ("human-monitor-command", {"command-line": "xp"}),
    ("human-monitor-command", {"command-line": "xp /zz 0"}),
    ("human-monitor-command", {"command-line": "xp /6wx 0x40800000"}),
    ("human-monitor-command", {"command-line": "xp /20bx 0x40800000"}),
    ("human-monitor-command", {"command-line": "xp /3gx 0x40800000"}),
    ("human-monitor-command", {"command-line": "xp /5hx 0x40800000"}),
    ("human-monitor-command", {"command-line": "xp /4wd 0x40800000"}),
    ("human-monitor-command", {"command-line": "xp /4wu 0x40800000"}),
    ("human-monitor-command", {"command-line": "xp /4bc 0x40800000"}),
    ("pmemsave", {"val": 0x4000_0000, "size": 16, "filename": "/nonexistent/x"}),
    ("pmemsave", {"val": 0x4000_0000, "filename": "x"}),
]


def test_same_answers(peer: QmpClient, ours: QmpClient) -> None:
    different = [
        (command, arguments, theirs, mine)
        for command, arguments in SAME_ANSWER
        if (theirs := outcome(peer, command, arguments)) != (mine := outcome(ours, command, arguments))
    ]
    assert not different, "\n".join(map(str, different))


def shape(value: Any) -> Any:
    """Names and types, without the values."""
    if isinstance(value, dict):
        return {name: shape(member) for name, member in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    # JSON has one kind of number: QEMU writes a rate that happens to be whole without a point.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "number" if is_number else type(value).__name__


@pytest.mark.parametrize("command", ["query-version", "query-cpus-fast", "query-commands"])
def test_same_shapes(peer: QmpClient, ours: QmpClient, command: str) -> None:
    assert shape(ours.command(command)) == shape(peer.command(command))


def test_same_parameters_and_capabilities(peer: QmpClient, ours: QmpClient) -> None:
    own = {
        name: value
        for name, value in ours.command("query-migrate-parameters").items()
        if "sterna" not in name
    }
    assert own == peer.command("query-migrate-parameters")
    assert ours.command("query-migrate-capabilities") == peer.command("query-migrate-capabilities")


def test_our_commands_are_qemus_but_for_our_own(peer: QmpClient, ours: QmpClient) -> None:
    theirs = {command["name"] for command in peer.command("query-commands")}
    mine = {command["name"] for command in ours.command("query-commands")}
    assert {name for name in mine - theirs if not name.startswith("x-sterna-")} == set()


def test_a_finished_migration_has_the_same_fields(peer: QmpClient, ours: QmpClient, tmp_path: Path) -> None:
    infos = []
    for client in (peer, ours):
        client.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        client.command("migrate", uri=f"exec:cat > {tmp_path}/stream")
        seen = []
        while "completed" not in seen:
            event = client.wait_event(lambda e: e["event"] == "MIGRATION", TIMEOUT)
            assert set(event) == {"timestamp", "event", "data"}
            assert event["data"]["status"] != "failed"
            seen.append(event["data"]["status"])
        infos.append(client.command("query-migrate"))
    theirs, mine = infos
    own = {name: value for name, value in mine.items() if "sterna" not in name}
    assert shape(own) == shape(theirs)
    assert json.dumps(mine)
