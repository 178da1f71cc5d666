"""QMP commands on a real machine, through the server."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.vms import wait_for
from tests.monitor.machines import Monitored, monitored
from tests.monitor.qmpserver import TIMEOUT
from tests.refusal import Refusal, refusing

from sterna.monitor.client import QmpClient
from sterna.monitor.commands import Commands
from sterna.monitor.protocol import QmpError

RAM = 0x4000_0000


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Monitored]:
    with monitored(tmp_path / "qmp") as running:
        yield running


@pytest.fixture
def client(vm: Monitored) -> Iterator[QmpClient]:
    with vm.server.client() as connected:
        yield connected


def wait_status(client: QmpClient, *statuses: str) -> None:
    """Until a MIGRATION event tells one of these statuses."""
    client.wait_event(lambda e: e["event"] == "MIGRATION" and e["data"]["status"] in statuses, TIMEOUT)


def test_run_states_and_their_events(client) -> None:
    assert client.command("query-status") == {"status": "prelaunch", "singlestep": False, "running": False}
    assert client.command("cont") == {}
    assert client.events.popleft()["event"] == "RESUME"
    assert client.command("query-status")["running"] is True
    assert client.command("stop") == {}
    assert client.events.popleft()["event"] == "STOP"
    assert client.command("query-status")["status"] == "paused"
    client.command("stop")
    assert not client.events


def test_the_queries_are_shaped_like_qemus(client) -> None:
    assert client.command("query-name") == {"name": "tested"}
    assert client.command("query-uuid") == {"UUID": "00000000-0000-0000-0000-000000000000"}
    assert client.command("query-kvm") == {"enabled": False, "present": False}
    [cpu] = client.command("query-cpus-fast")
    assert cpu["cpu-index"] == 0
    assert cpu["target"] == "arm"
    assert cpu["thread-id"] > 0
    assert cpu["props"] == {"core-id": 0, "thread-id": 0, "socket-id": 0, "cluster-id": 0}
    assert client.command("query-migrate") == {}
    assert client.command("x-sterna-query-page-heat") == []
    names = {command["name"] for command in client.command("query-commands")}
    assert {"qmp_capabilities", "query-migrate", "migrate_cancel", "human-monitor-command"} <= names


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("nope", {}, "The command nope has not been found"),
        ("stop", {"a": 1}, "Parameter 'a' is unexpected"),
        ("migrate", {}, "Parameter 'uri' is missing"),
        ("migrate", {"uri": 5}, "Invalid parameter type for 'uri', expected: string"),
        ("migrate", {"uri": "tcp:127.0.0.1:1", "zzz": 1}, "Parameter 'zzz' is unexpected"),
        ("migrate", {"uri": "tcp:127.0.0.1:1", "resume": "yes"}, "Invalid parameter type for 'resume', expected: boolean"),
        ("migrate", {"uri": "foo:bar"}, "not a migration URI"),
        ("migrate", {"uri": ""}, "not a migration URI"),
        ("migrate", {"uri": "tcp:127.0.0.1"}, "tcp"),
        ("migrate", {"uri": "tcp:127.0.0.1:99999"}, "99999"),
        ("migrate", {"uri": "unix:"}, "unix"),
        ("migrate", {"uri": "tcp:127.0.0.1:1", "resume": True}, "resumed"),
        ("migrate", {"uri": "tcp:127.0.0.1:1", "blk": True}, "blk"),
        ("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}, "'-incoming' was not specified on the command line"),
        ("migrate-set-capabilities", {}, "Parameter 'capabilities' is missing"),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "foo", "state": True}]},
            "Parameter 'capability' does not accept value 'foo'",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "xbzrle", "state": 1}]},
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "xbzrle"}]},
            "Parameter 'capabilities[0].state' is missing",
        ),
        (
            "migrate-set-capabilities",
            {"capabilities": [{"capability": "xbzrle", "state": False, "x": 1}]},
            "Parameter 'capabilities[0].x' is unexpected",
        ),
        ("migrate-set-capabilities", {"capabilities": "all"}, "Invalid parameter type for 'capabilities', expected: array"),
        ("migrate-set-parameters", {"foo": 1}, "Parameter 'foo' is unexpected"),
        ("migrate-set-parameters", {"downtime-limit": "300"}, "downtime-limit"),
        ("migrate-set-parameters", {"downtime-limit": -1}, "downtime-limit"),
        ("migrate-set-parameters", {"downtime-limit": 2_000_001}, "downtime-limit"),
        ("migrate-set-parameters", {"max-bandwidth": 1 << 65}, "max-bandwidth"),
        ("migrate-set-parameters", {"max-bandwidth": True}, "max-bandwidth"),
        ("human-monitor-command", {}, "Parameter 'command-line' is missing"),
        ("human-monitor-command", {"command-line": "stop", "cpu-index": 9}, "cpu-index"),
        ("pmemsave", {"val": RAM, "size": 16, "filename": "/nonexistent/x"}, "Could not open '/nonexistent/x'"),
        ("pmemsave", {"val": 0, "size": 16, "filename": "x"}, "not in RAM"),
        ("pmemsave", {"val": RAM, "size": 1 << 62, "filename": "x"}, "not in RAM"),
        ("pmemsave", {"val": RAM, "size": -1, "filename": "x"}, "negative"),
        ("pmemsave", {"val": RAM, "size": 1.5, "filename": "x"}, "Invalid parameter type for 'size', expected: integer"),
        ("x-sterna-unmap", {"val": 0, "size": 4096}, "not in RAM"),
        ("x-sterna-unmap", {"val": RAM, "size": 1 << 62}, "not in RAM"),
        ("x-sterna-unmap", {"val": RAM + 1, "size": 4096}, "not whole pages"),
        ("x-sterna-age", {"val": RAM, "size": 4097}, "not whole pages"),
        ("x-sterna-age", {"val": RAM}, "Parameter 'size' is missing"),
        ("x-sterna-query-page-heat", {"cells": 0}, "cells"),
        ("x-sterna-query-page-heat", {"cells": 1 << 20}, "cells"),
    ],
)  # fmt: skip
def test_bad_commands_are_named(client, command: str, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(QmpError) as caught:
        client.execute(command, arguments)
    assert expected in caught.value.desc
    assert "\n" not in caught.value.desc
    wanted = "CommandNotFound" if command == "nope" else "GenericError"
    assert caught.value.error_class == wanted
    assert client.command("query-status")["status"] == "prelaunch"


def test_parameters_and_capabilities_are_set_together_or_not_at_all(client) -> None:
    client.execute("migrate-set-parameters", {"max-bandwidth": 1_000_000, "downtime-limit": 50})
    with pytest.raises(QmpError):
        client.execute("migrate-set-parameters", {"max-bandwidth": 5, "downtime-limit": -1})
    parameters = client.command("query-migrate-parameters")
    assert parameters["max-bandwidth"] == 1_000_000
    assert parameters["downtime-limit"] == 50
    client.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    states = {c["capability"]: c["state"] for c in client.command("query-migrate-capabilities")}
    assert states["events"] is True
    assert states["xbzrle"] is False


def test_guest_memory_is_saved_to_a_file(vm: Monitored, client, tmp_path: Path) -> None:
    file = tmp_path / "memory"
    size = (1 << 20) + 3
    client.command("pmemsave", val=RAM + 1, size=size, filename=str(file))
    assert file.read_bytes() == bytes(vm.machine.ram_blocks[0].data[1 : size + 1])
    client.command("pmemsave", val=RAM, size=0, filename=str(file))
    assert file.read_bytes() == b""


def test_a_refused_save_leaves_the_file_alone(client, tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_text("kept")
    with pytest.raises(QmpError):
        client.command("pmemsave", val=RAM, size=1 << 30, filename=str(file))
    assert file.read_text() == "kept"


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_save_that_the_disk_does_not_take_leaves_what_was_there(
    call: str, vm: Monitored, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = folder / "memory"
    file.write_text("kept")
    save = {"val": RAM, "size": 3 << 20, "filename": str(file)}
    with pytest.raises(QmpError, match=f"Could not write '{file}': No space left on device"):
        refusing(Refusal(call, errno.ENOSPC), lambda: Commands(vm.control).execute("pmemsave", save))
    assert file.read_text() == "kept"
    assert list(folder.iterdir()) == [file]


def test_what_is_saved_is_for_its_owner_only(client, tmp_path: Path) -> None:
    file = tmp_path / "memory"
    for _ in range(2):
        client.command("pmemsave", val=RAM, size=16, filename=str(file))
        assert file.stat().st_mode & 0o777 == 0o600
        file.chmod(0o644)


@pytest.mark.parametrize("name", ["fifo", "/dev/zero", "new/"])
def test_memory_is_saved_to_files_only(name: str, client, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(QmpError, match=r"Could not open '.*': it is a .*, not a regular file"):
        client.command("pmemsave", val=RAM, size=16, filename=os.path.join(tmp_path, name))
    assert client.command("query-status")["running"] is False


def test_a_machine_without_a_guest_of_its_own_does_not_migrate(client, tmp_path: Path) -> None:
    saved, broken = tmp_path / "saved", tmp_path / "broken"
    client.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    client.command("migrate", uri=f"file:{saved}")
    wait_status(client, "completed")
    before = saved.stat()
    with pytest.raises(QmpError, match="the guest was saved, and stands still; 'cont' first, then migrate"):
        client.command("migrate", uri=f"file:{saved}")
    assert client.command("query-migrate")["status"] == "completed"
    after = saved.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )
    broken.write_bytes(b"no stream")
    with monitored(tmp_path / "waiting", incoming=True) as waiting, waiting.server.client() as other:
        waiting.migration.incoming(f"file:{broken}")
        assert waiting.migration.wait(TIMEOUT).status.value == "failed"
        with pytest.raises(QmpError, match="cannot migrate: the machine is in state inmigrate, this needs "):
            other.command("migrate", uri=f"file:{saved}")
    assert saved.stat().st_ino == before.st_ino


def test_stage2_statistics(client) -> None:
    before = client.command("x-sterna-query-stage2")
    assert before["faults-translation"] == 0
    client.command("cont")
    client.command("stop")
    assert client.command("x-sterna-query-stage2")["tables"] >= before["tables"]


def test_quit_asks_for_the_end(vm: Monitored, client) -> None:
    assert client.command("quit") == {}
    assert vm.quits == ["host-qmp-quit"]


def test_migration_between_two_monitors(vm: Monitored, client, tmp_path: Path) -> None:
    events = [{"capability": "events", "state": True}]
    with monitored(tmp_path / "qmp2", incoming=True) as other, other.server.client() as destination:
        assert destination.command("query-status")["status"] == "inmigrate"
        destination.command("migrate-set-capabilities", capabilities=events)
        destination.command("migrate-incoming", uri="tcp:127.0.0.1:0")
        with pytest.raises(QmpError, match="started already"):
            destination.command("migrate-incoming", uri="tcp:127.0.0.1:0")
        [address] = destination.command("query-migrate")["socket-address"]
        assert address["type"] == "inet"
        client.command("migrate-set-capabilities", capabilities=events)
        client.command("cont")
        client.command("migrate", uri=f"tcp:127.0.0.1:{address['port']}")
        statuses, passes = [], []
        while "completed" not in statuses:
            event = client.wait_event(lambda e: e["event"].startswith("MIGRATION"), TIMEOUT)
            if event["event"] == "MIGRATION":
                statuses.append(event["data"]["status"])
            else:
                passes.append(event["data"]["pass"])
        assert statuses == ["setup", "active", "device", "completed"]
        assert passes == list(range(1, len(passes) + 1))
        info = client.command("query-migrate")
        assert info["status"] == "completed"
        assert info["ram"]["remaining"] == 0
        assert isinstance(info["downtime"], int)
        assert info["x-sterna"]["verified"] is True
        assert client.command("query-status")["status"] == "postmigrate"
        with pytest.raises(
            QmpError, match=r"^the guest has migrated and runs at the destination$"
        ) as refused:
            client.command("cont")
        assert refused.value.error_class == "GenericError"
        told = client.command("human-monitor-command", command_line="cont")
        assert "runs at the destination" in told
        wait_status(destination, "completed")
        assert destination.command("query-status")["running"] is True
        assert destination.command("query-migrate")["status"] == "completed"
        [heat] = client.command("x-sterna-query-page-heat", cells=16)
        assert (heat["block"], heat["pages"], heat["pages-per-cell"]) == ("mach-virt.ram", 4096, 256)
        assert sum(heat["sent"]) >= 4096
        assert min(heat["most"]) == 1


def test_failed_and_cancelled_migrations_leave_the_guest_running(client, tmp_path: Path) -> None:
    client.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    client.command("cont")
    client.command("migrate", uri="tcp:127.0.0.1:1")
    wait_status(client, "failed")
    assert "refused" in client.command("query-migrate")["error-desc"]
    assert client.command("query-status")["running"] is True
    with monitored(tmp_path / "qmp2", incoming=True) as other, other.server.client() as destination:
        destination.command("migrate-incoming", uri=f"unix:{tmp_path}/in")
        # A young guest may take no more than 40 kB.
        client.command("migrate-set-parameters", max_bandwidth=4096)
        client.command("migrate", uri=f"unix:{tmp_path}/in")
        with pytest.raises(QmpError, match="in progress"):
            client.command("migrate", uri=f"unix:{tmp_path}/in")
        wait_status(client, "active")
        client.command("migrate_cancel")
        wait_status(client, "cancelled")
        assert client.command("query-migrate")["status"] == "cancelled"
        assert client.command("query-status")["running"] is True
        client.command("migrate_cancel")


def test_the_host_takes_mappings_away_and_asks_which_were_used(client) -> None:
    ram = {"val": RAM, "size": 16 << 20}
    client.command("cont")
    wait_for(lambda: client.execute("x-sterna-age", ram)["young"] > 1)
    client.command("stop")
    client.execute("x-sterna-age", ram)
    assert client.execute("x-sterna-age", ram) == {"young": 0}
    before = client.command("x-sterna-query-stage2")
    assert client.execute("x-sterna-unmap", ram) == {}
    after = client.command("x-sterna-query-stage2")
    # What is left are devices.
    assert after["blocks-2m"] == 0
    assert before["blocks-2m"] > 0
    client.command("cont")
    wait_for(
        lambda: client.command("x-sterna-query-stage2")["faults-translation"] > before["faults-translation"]
    )
    client.command("stop")


@pytest.mark.parametrize("human", [False, True])
def test_a_name_service_that_does_not_answer_holds_up_one_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, human: bool
) -> None:
    asked, answer, real = threading.Event(), threading.Event(), socket.getaddrinfo

    def silent(host: str, *arguments: Any, **named: Any) -> Any:
        if host == "somewhere" and not named["flags"] & socket.AI_NUMERICHOST:
            asked.set()
            answer.wait(TIMEOUT)
        return real(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr("sterna.migration.channels.tcp.LOOKUP_SECONDS", TIMEOUT)
    with (
        monitored(tmp_path / "qmp2", incoming=True) as vm,
        vm.server.client() as one,
        vm.server.client() as other,
    ):

        def wait_there() -> None:
            with pytest.raises(QmpError, match="somewhere"):
                one.command("migrate-incoming", uri="tcp:somewhere:0")

        def type_it() -> None:
            line = "migrate_incoming tcp:somewhere:0"
            assert "somewhere" in one.command("human-monitor-command", command_line=line)

        thread = threading.Thread(target=type_it if human else wait_there)
        thread.start()
        assert asked.wait(TIMEOUT)
        assert other.command("query-status")["status"] == "inmigrate"
        assert other.command("human-monitor-command", command_line="info status")
        assert other.command("query-migrate") is not None
        assert other.command("stop") == {}
        assert thread.is_alive()
        answer.set()
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def test_a_long_save_ends_with_the_machine(vm: Monitored, client, tmp_path: Path) -> None:
    vm.control.closing.set()
    with pytest.raises(QmpError, match="is being closed"):
        client.command("pmemsave", val=0x4000_0000, size=4096, filename=str(tmp_path / "saved"))
    assert not list(tmp_path.glob("*saved*"))
