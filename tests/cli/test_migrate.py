"""`sterna migrate` between two processes."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.cli.vms import TIMEOUT, Vm, pair, vm, wait_for
from tests.needs import qemu_program

from sterna.cli.result import exit_code, farewell, outcome_line, summarise
from sterna.monitor.addresses import parse_address
from sterna.monitor.client import QmpClient

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "sterna", "migrate"]


def migrate(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def test_completed_and_verified(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(
            source.address, destination.incoming_uri(), "--json", "--verify", "--bandwidth", "1Gbit"
        )
        assert done.returncode == 0
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1
        result = json.loads(done.stdout)
        assert result["settings"]["max-bandwidth"] == 125_000_000
        assert (result["source_state"], result["destination_asked"]) == ("postmigrate", True)
        assert result["status"] == "completed"
        assert result["verified"] is True
        assert result["ram_digest_source"] == result["ram_digest_destination"]
        assert result["ram_bytes"] == 16 << 20
        assert result["passes"][0]["pages"] == 4096
        assert result["downtime_ms"] > 0
        assert source.qmp.command("query-migrate-parameters")["max-bandwidth"] == 128 << 20
        assert source.qmp.command("query-status")["status"] == "postmigrate"
        assert destination.running()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(source.address, destination.incoming_uri(), "--no-verify", "--downtime-limit", "500ms")
        assert done.returncode == 0
        assert done.stdout == ""
        assert "\x1b" not in done.stderr
        assert "completed, RAM not compared" in done.stderr
        assert re.search(r"total [\d.]+ m?s, \d+ passes, .* sent, downtime [\d.]+ ms", done.stderr)
        assert "settings: max-bandwidth 134.2 MB/s, downtime-limit 500 ms, " in done.stderr
        assert done.stderr.endswith("the source has no guest any more: end it with 'quit'\n")
        assert source.qmp.command("query-migrate-parameters")["downtime-limit"] == 300


@pytest.mark.parametrize("option", ["--audit", "--no-audit"])
def test_an_audit_is_the_users_choice(tmp_path: Path, option: str) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(source.address, destination.incoming_uri(), option, "--json")
        assert done.returncode == 0
        audit = json.loads(done.stdout)["audit"]
        assert (audit is not None) == (option == "--audit")
        assert source.qmp.command("query-migrate-parameters")["x-sterna-audit"] is False


def test_failure_keeps_the_guest_and_a_second_try_succeeds(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(source.address, "tcp:127.0.0.1:1")
        assert done.returncode == 3
        assert "refused" in done.stderr
        assert "the guest runs on at the source" in done.stderr
        assert source.running()
        done = migrate(source.address, destination.incoming_uri())
        assert done.returncode == 0
        assert "RAM verified" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_cancel(tmp_path: Path, number: signal.Signals) -> None:
    with pair(tmp_path) as (source, destination):
        process = subprocess.Popen(
            [*COMMAND, source.address, destination.incoming_uri(), "--bandwidth", "4kB", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: source.qmp.command("query-migrate").get("status") == "active")
        process.send_signal(number)
        out, errors = process.communicate(timeout=TIMEOUT)
        assert errors == ""
        assert process.returncode == 4
        assert json.loads(out)["status"] == "cancelled"
        assert source.qmp.command("query-migrate")["status"] == "cancelled"
        assert source.running()
        assert not destination.running()


def test_the_source_dies_on_the_way(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        process = subprocess.Popen(
            [*COMMAND, source.address, destination.incoming_uri(), "--bandwidth", "4kB", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: source.qmp.command("query-migrate").get("status") == "active")
        source.process.kill()
        out, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 6
        assert "sterna: error: the VM was lost" in errors
        assert json.loads(out)["status"] == "error"
        assert "Traceback" not in errors


ASKED = ("--set", "x-sterna-verify=on", "--set", "xbzrle=on")


def test_detached_returns_at_once(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(source.address, destination.incoming_uri(), "-d", *ASKED)
        assert done.returncode == 0
        assert done.stderr == ""
        assert done.stdout == "started; these settings stay: x-sterna-verify, xbzrle\n"
        wait_for(lambda: source.qmp.command("query-migrate")["status"] == "completed")
        assert source.qmp.command("query-migrate-parameters")["x-sterna-verify"] == "on"
        assert {"capability": "xbzrle", "state": True} in source.qmp.command("query-migrate-capabilities")


def test_what_the_vm_refuses(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, _):
        for arguments, expected in (
            (("tcp:127.0.0.1:1", "--set", "downtime-limit=9999999"), "downtime-limit"),
            (("tcp:127.0.0.1:1", "--set", "xbzrle-cache-size=4097"), "xbzrle-cache-size"),
        ):
            done = migrate(source.address, *arguments)
            assert done.returncode == 1
            assert done.stderr.startswith("sterna: error: ")
            assert done.stderr.count("\n") == 1
            assert expected in done.stderr


@pytest.mark.parametrize("columns", [40, 100, 200])
def test_live_display_on_a_terminal(tmp_path: Path, columns: int) -> None:
    with pair(tmp_path) as (source, destination):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (30, columns))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        process = subprocess.Popen(
            # For two seconds: one that has completed before it is first looked at is not shown.
            [*COMMAND, source.address, destination.incoming_uri(), "--bandwidth", "20kB"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            env={**environment, "TERM": "xterm"},
        )
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 4096):
                shown += data
        except OSError:
            pass  # the other end is closed: it has ended
        os.close(ours)
        assert process.wait(TIMEOUT) == 0
        text = shown.decode()
        assert "\x1b[" in text
        percentages = [int(number) for number in re.findall(r"(\d+)%", text)]
        assert percentages
        assert percentages == sorted(percentages)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        assert max(map(len, shown.replace("\r", "\n").split("\n"))) <= columns
        shown = " ".join(shown.split())
        for expected in (
            "dirtying",
            "sending",
            "remaining",
            "RAM verified",
            "downtime",
            "end it with 'quit'",
        ):
            assert expected in shown


def listens(path: Path) -> bool:
    """A socket is there before anybody listens at it."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@contextmanager
def qemu_at_rest(path: Path, *arguments: str) -> Iterator[str]:
    """A QEMU whose guest does not run, with QMP at `path`: its address."""
    command = [
        qemu_program(),
        "-M",
        "virt",
        "-cpu",
        "cortex-a15",
        "-m",
        "16",
        "-S",
        "-nodefaults",
        "-display",
        "none",
    ]
    process = subprocess.Popen([*command, *arguments, "-qmp", f"unix:{path},server,wait=off"])
    try:
        wait_for(lambda: path.is_socket() and listens(path))
        yield f"unix:{path}"
    finally:
        process.kill()
        process.wait(TIMEOUT)


@pytest.mark.qemu
def test_it_drives_a_qemu_too(tmp_path: Path) -> None:
    with qemu_at_rest(tmp_path / "qmp") as address:
        done = migrate(address, f"exec:cat > {tmp_path}/stream", "--json", "--bandwidth", "unlimited")
        assert done.stderr == ""
        assert done.returncode == 8  # a command may have handed the guest on
        result = json.loads(done.stdout)
        assert result["status"] == "completed"
        assert result["verified"] is None
        assert result["total_ms"] >= 0
        assert result["transferred_bytes"] > 0
        done = migrate(address, "tcp:127.0.0.1:1", "--verify")
        assert done.returncode == 1
        assert "x-sterna-verify" in done.stderr


@pytest.mark.qemu
def test_a_qemu_hears_of_a_refusal(tmp_path: Path) -> None:
    """It gets the return path for the try. Its firmware has no place here, which is known at the very end."""
    firmware = tmp_path / "firmware"
    firmware.write_bytes(b"\x55" * 4096)
    with (
        qemu_at_rest(tmp_path / "qmp", "-bios", str(firmware)) as address,
        vm(tmp_path, "destination", "--incoming", "tcp:127.0.0.1:0", "--serial", "null") as destination,
    ):
        done = migrate(address, destination.incoming_uri())
        assert "settings: max-bandwidth 134.2 MB/s, downtime-limit 300 ms, return-path on" in done.stderr
        assert done.returncode == 3
        assert "failed: " in done.stderr
        # It tells its source first.
        wait_for(lambda: "virt.flash0" in destination.errors())
        with QmpClient.connect(parse_address(address)) as client:
            assert {"capability": "return-path", "state": False} in client.command(
                "query-migrate-capabilities"
            )


@pytest.mark.qemu
def test_what_pause_before_switchover_waits_for_is_sent(tmp_path: Path) -> None:
    with qemu_at_rest(tmp_path / "qmp") as address:
        with QmpClient.connect(parse_address(address)) as client:
            pause = {"capability": "pause-before-switchover", "state": True}
            client.command("migrate-set-capabilities", capabilities=[pause])
        done = migrate(address, f"exec:cat > {tmp_path}/stream")
        assert "pre-switchover: the guest is stopped" in done.stderr
        assert done.returncode == 8


def test_the_policy_is_set(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(source.address, destination.incoming_uri(), "--json", "--policy", "deadline:30")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["policy"] == "deadline"
        # All three are rounded, to a thousandth.
        predicted, real = result["predicted_downtime_ms"], result["downtime_ms"]
        assert (predicted - 0.001) / (real + 0.001) - 0.001 <= result["predicted_over_real"]
        assert result["predicted_over_real"] <= (predicted + 0.001) / (real - 0.001) + 0.001
        assert result["settings"]["x-sterna-deadline"] == 30
        for line in ("policy: deadline", "predicted downtime: "):
            assert line in source.qmp.command("human-monitor-command", command_line="info migrate")


@pytest.mark.parametrize("policy", ["fast", "deadline", "deadline:", "deadline:0", "deadline:1s", "fixed:3"])
def test_a_policy_that_is_none(policy: str) -> None:
    done = migrate("unix:/nowhere", "tcp:127.0.0.1:1", "--policy", policy)
    assert done.returncode == 2
    assert "--policy: " in done.stderr
    limits = "is not a deadline in seconds, 1 to 1000000\n"
    known = "is not adaptive, deadline:SECONDS or fixed\n"
    assert done.stderr.endswith(limits if policy.startswith("deadline:") else known)


def settings_of(vm: Vm) -> list[object]:
    names = ("query-migrate-parameters", "query-migrate-capabilities", "x-sterna-query-asked-capabilities")
    return [vm.qmp.command(name) for name in names]


def test_settings_are_those_of_one_try(tmp_path: Path) -> None:
    options = ("--bandwidth", "4kB", "--downtime-limit", "7ms", "--policy", "fixed", "--no-verify", "--audit")
    with pair(tmp_path) as (source, destination):
        before = settings_of(source)
        # An option of its own says more than --set does.
        options = (*options, "--set", "downtime-limit=8", "--set", "auto-converge=true")
        for number, converge in enumerate(("--auto-converge", "--no-auto-converge")):
            done = migrate(source.address, "tcp:127.0.0.1:1", *options, converge)
            assert done.returncode == 3
            shown = "max-bandwidth 4.0 kB/s, downtime-limit 7 ms, x-sterna-policy fixed, x-sterna-audit on"
            assert (
                f"settings: {shown}, x-sterna-verify off, auto-converge {('on', 'off')[number]}\n"
                in done.stderr
            )
            assert settings_of(source) == before
        # What the VM refuses leaves nothing behind either.
        assert (
            migrate(source.address, "exec:true", *options, "--set", "xbzrle-cache-size=4097").returncode == 1
        )
        source.qmp.command(
            "migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}]
        )
        before = settings_of(source)
        done = migrate(source.address, "exec:true", *options, "--auto-converge")
        assert (done.returncode, "multifd is not supported" in done.stderr) == (1, True)
        assert settings_of(source) == before
        assert source.running()
        # Who gives the destination's address for the source's is told so.
        done = migrate(destination.address, "tcp:127.0.0.1:1", *options)
        assert (done.returncode, "QMP-ADDRESS is to be the source's" in done.stderr) == (1, True)


def test_what_another_client_sets_meanwhile_is_not_set_back(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        before = settings_of(source)
        options = (
            "--bandwidth",
            "4kB",
            "--downtime-limit",
            "7s",
            "--policy",
            "fixed",
            "--auto-converge",
            "--json",
        )
        process = subprocess.Popen(
            [*COMMAND, source.address, destination.incoming_uri(), *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: source.qmp.command("query-migrate").get("status") == "active")
        source.qmp.command("migrate-set-parameters", max_bandwidth=0)
        out, _ = process.communicate(timeout=TIMEOUT)
        assert json.loads(out)["status"] == "completed"
        before[0]["max-bandwidth"] = 0
        assert settings_of(source) == before


def test_nothing_is_set_on_a_migration_that_is_under_way(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        source.qmp.command("migrate-set-parameters", max_bandwidth=4096)
        source.qmp.command("migrate", uri=destination.incoming_uri())
        done = migrate(source.address, "tcp:127.0.0.1:1", "--bandwidth", "unlimited", "--auto-converge")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "there is a migration in progress already" in done.stderr
        assert source.qmp.command("query-migrate")["status"] in ("setup", "active")
        assert source.qmp.command("query-migrate-parameters")["max-bandwidth"] == 4096


def test_where_the_guest_is_its_machine_says(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        source.qmp.command("stop")
        done = migrate(source.address, "tcp:127.0.0.1:1")
        assert "the guest is at the source, which does not run it: its state is paused" in done.stderr
        assert "runs on" not in done.stderr
        done = migrate(source.address, destination.incoming_uri(), "--json")
        assert json.loads(done.stdout)["source_state"] == "postmigrate"
        done = migrate(source.address, destination.incoming_uri())
        assert done.returncode == 1
        assert done.stderr == "sterna: error: the guest has migrated and runs at the destination\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"run-state": "running"}, "failed: no; the guest runs on at the source"),
        (
            {"run-state": "postmigrate"},
            "failed: no; the source does not run the guest, and takes it for gone: look",
        ),
        (
            {"run-state": "paused", "x-sterna": {"in-doubt": True}},
            "failed: no; who runs the guest is in doubt",
        ),
        (
            {"run-state": "paused", "status": "cancelled"},
            "cancelled: the guest is at the source, which does not",
        ),
        ({"run-state": "running", "status": "cancelled"}, "cancelled: the guest runs on at the source"),
    ],
)
def test_no_verdict_says_more_than_is_known(change: dict[str, object], expected: str) -> None:
    assert outcome_line(summarise({"status": "failed", "error-desc": "no", **change})).startswith(expected)


OF_QEMU: dict[str, object] = {}
OF_STERNA: dict[str, object] = {"x-sterna": {"peer": ""}}


@pytest.mark.parametrize(
    ("uri", "own", "capabilities", "code", "expected", "left"),
    [
        ("tcp:a:1", OF_QEMU, {"return-path": True}, 0, "completed, RAM not compared", "end it with 'quit'"),
        (
            "tcp:a:1",
            OF_QEMU,
            {"return-path": False},
            8,
            "nobody has asked the destination",
            "keep the source",
        ),
        ("tcp:a:1", OF_STERNA, {}, 8, "nobody has asked the destination", "keep the source"),
        ("fd:7", OF_QEMU, {}, 8, "nobody has asked the destination", "keep the source"),
        # Where a command leads, a guest may run.
        ("exec:cat > f", OF_QEMU, {}, 8, "nobody has asked the destination", "keep the source"),
        ("exec:cat > f", OF_STERNA, {}, 8, "nobody has asked the destination", "keep the source"),
        ("file:/f", OF_QEMU, {}, 0, "all of the guest went to file:/f", ""),
        ("file:/f", OF_STERNA, {}, 0, "all of the guest went to file:/f", ""),
    ],
)
def test_a_destination_that_nobody_asked_is_no_success(
    uri: str,
    own: dict[str, object],
    capabilities: dict[str, bool],
    code: int,
    expected: str,
    left: str,
) -> None:
    info = {"status": "completed", "uri": uri, "run-state": "postmigrate", **own}
    summary = summarise(info, capabilities)
    assert exit_code(summary, must_verify=False) == code
    assert expected in outcome_line(summary)
    assert left in farewell(summary)
    assert bool(farewell(summary)) == bool(left)


def test_the_source_dies_right_after_the_command(tmp_path: Path) -> None:
    """The connection ends with the answer to `migrate`."""
    path = tmp_path / "qmp"
    answers = {
        "query-status": {"status": "running"},
        "query-migrate": {},
        "query-migrate-parameters": {"downtime-limit": 300, "x-sterna-policy": "adaptive"},
        "query-migrate-capabilities": [],
        "x-sterna-query-asked-capabilities": [],
    }

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as lines:
            print(json.dumps({"QMP": {}}), file=lines, flush=True)
            for line in lines:
                name = json.loads(line)["execute"]
                print(json.dumps({"return": answers.get(name, {})}), file=lines, flush=True)
                if name == "migrate":
                    return

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        done = migrate(f"unix:{path}", "tcp:127.0.0.1:1", "--json", "--bandwidth", "1MB")
        thread.join(TIMEOUT)
    assert done.returncode == 6
    assert done.stderr.startswith("sterna: error: the VM was lost during the migration")
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["status"] == "error"


def test_a_limit_that_this_host_cannot_reach_is_told_at_once(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        process = subprocess.Popen(
            [
                *COMMAND,
                source.address,
                destination.incoming_uri(),
                "--downtime-limit",
                "1ms",
                "--bandwidth",
                "4kB",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if (
                    "with a downtime limit of 1 ms the guest only stops after a pass that leaves nothing"
                    in line
                ):
                    break
            else:
                pytest.fail("it was not said")
            assert source.qmp.command("query-migrate")["ram"]["dirty-sync-count"] == 1
        finally:
            process.kill()
            process.communicate(timeout=TIMEOUT)
