"""`sterna migrate` between two processes."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.vms import TIMEOUT, pair, wait_for

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
        assert result["status"] == "completed"
        assert result["verified"] is True
        assert result["ram_digest_source"] == result["ram_digest_destination"]
        assert result["ram_bytes"] == 16 << 20
        assert result["passes"][0]["pages"] == 4096
        assert result["downtime_ms"] > 0
        assert source.qmp.command("query-migrate-parameters")["max-bandwidth"] == 125_000_000
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
        assert source.qmp.command("query-migrate-parameters")["downtime-limit"] == 500


@pytest.mark.parametrize("option", ["--audit", "--no-audit"])
def test_an_audit_is_the_users_choice(tmp_path: Path, option: str) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(source.address, destination.incoming_uri(), option, "--json")
        assert done.returncode == 0
        audit = json.loads(done.stdout)["audit"]
        assert (audit is not None) == (option == "--audit")
        assert source.qmp.command("query-migrate-parameters")["x-sterna-audit"] is (option == "--audit")


def test_failure_keeps_the_guest_and_a_second_try_succeeds(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(source.address, "tcp:127.0.0.1:1")
        assert done.returncode == 3
        assert "refused" in done.stderr
        assert "the guest stays at the source" in done.stderr
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


def test_detached_returns_at_once(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(source.address, destination.incoming_uri(), "-d", "--set", "x-sterna-verify=on")
        assert done.returncode == 0
        assert done.stderr == ""
        wait_for(lambda: source.qmp.command("query-migrate")["status"] == "completed")


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


def test_live_display_on_a_terminal(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*COMMAND, source.address, destination.incoming_uri(), "--bandwidth", "8MB"],
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
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
        for expected in ("dirtying", "sending", "remaining", "RAM verified", "downtime"):
            assert expected in text


@pytest.mark.qemu
def test_it_drives_a_qemu_too(tmp_path: Path) -> None:
    if shutil.which("qemu-system-arm") is None:
        if os.environ.get("STERNA_REQUIRE_QEMU") == "1":
            pytest.fail("qemu-system-arm is missing, and STERNA_REQUIRE_QEMU=1")
        pytest.skip("qemu-system-arm is not installed")
    path = tmp_path / "qemu.qmp"
    command = [
        "qemu-system-arm",
        "-M",
        "virt",
        "-cpu",
        "cortex-a15",
        "-m",
        "32M",
        "-display",
        "none",
        "-S",
        "-nodefaults",
    ]
    process = subprocess.Popen([*command, "-qmp", f"unix:{path},server,wait=off"])
    try:
        wait_for(path.is_socket)
        done = migrate(f"unix:{path}", f"exec:cat > {tmp_path}/stream", "--json", "--bandwidth", "unlimited")
        assert done.stderr == ""
        assert done.returncode == 0
        result = json.loads(done.stdout)
        assert result["status"] == "completed"
        assert result["verified"] is None
        assert result["total_ms"] >= 0
        assert result["transferred_bytes"] > 0
        done = migrate(f"unix:{path}", "tcp:127.0.0.1:1", "--verify")
        assert done.returncode == 1
        assert "x-sterna-verify" in done.stderr
    finally:
        process.kill()
        process.wait(TIMEOUT)


def test_the_policy_is_set(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        done = migrate(source.address, destination.incoming_uri(), "--json", "--policy", "deadline:30")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["policy"] == "deadline"
        assert result["predicted_over_real"] == pytest.approx(
            result["predicted_downtime_ms"] / result["downtime_ms"], abs=0.001
        )
        assert source.qmp.command("query-migrate-parameters")["x-sterna-deadline"] == 30
        for line in ("policy: deadline", "predicted downtime: "):
            assert line in source.qmp.command("human-monitor-command", command_line="info migrate")


@pytest.mark.parametrize("policy", ["fast", "deadline", "deadline:", "deadline:0", "deadline:1s", "fixed:3"])
def test_a_policy_that_is_none(policy: str) -> None:
    done = migrate("unix:/nowhere", "tcp:127.0.0.1:1", "--policy", policy)
    assert done.returncode == 2
    assert "--policy: " in done.stderr
