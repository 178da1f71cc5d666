"""`sterna demo`, end to end, with a small guest."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.vms import TIMEOUT, alive, children, interrupt, wait_for

COMMAND = [sys.executable, "-m", "sterna", "demo"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--append", "2000 100 10", "--memory", "64M"),
        ("--append", "2000 100 5", "--memory", "32M", "--smp", "2", "--bandwidth", "200Mbit"),
        ("--kernel", "random", "--append", "3 1000 8", "--memory", "32M"),
        ("--kernel", "clock", "--memory", "16M", "--machine", "vexpress-a15"),
    ],
)
def test_verified(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*COMMAND, "--json", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["status"] == "completed"
    assert result["problems"] == []
    assert result["verified"] is True
    assert done.returncode == 0
    assert result["ram_digest_source"] == result["ram_digest_destination"] != ""
    assert result["total_ms"] >= result["downtime_ms"] > 0
    assert result["guest_gap_ms"] > 0
    assert result["passes"]
    assert all({"pages", "bytes", "ms", "dirty_pages_after"} <= set(record) for record in result["passes"])
    assert result["passes"][-1]["dirty_pages_after"] == 0
    assert result["transferred_bytes"] >= sum(record["bytes"] for record in result["passes"])
    assert set(result["stage2"]) == {"before", "during", "after"}
    before, after = result["stage2"]["before"], result["stage2"]["after"]
    assert before["faults_permission"] == 0
    assert after["faults_permission"] > 0
    assert after["blocks_dissolved"] > 0
    assert result["guest"]["steps_after"] > result["guest"]["steps_before"]


def test_report_for_people() -> None:
    done = subprocess.run(
        [*COMMAND, "--append", "500 20 5", "--memory", "16M"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.endswith("\nVERIFIED\n")
    for expected in (
        "dirtyram 500 20 5",
        "pass 1",
        "downtime",
        "RAM digest",
        "guest's own counter",
        "stage 2",
    ):
        assert expected in done.stdout


def slow_demo(*arguments: str) -> "subprocess.Popen[str]":
    """A demo whose migration takes minutes."""
    return subprocess.Popen(
        [*COMMAND, "--append", "2000 100 10", "--memory", "64M", "--bandwidth", "40kB", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def both_children(process: "subprocess.Popen[str]") -> set[int]:
    wait_for(lambda: len(children(process.pid)) == 2)
    return children(process.pid)


def test_ctrl_c_cancels_and_leaves_no_process_behind() -> None:
    process = slow_demo()
    assert process.stderr is not None
    guests = both_children(process)
    line = ""
    while "active" not in line:
        line = process.stderr.readline()
        assert line, "the demo ended"
    interrupt(process)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 4
    assert "cancelled" in out
    assert not any(alive(pid) for pid in guests)


def test_a_demo_that_is_killed_takes_its_processes_along() -> None:
    process = slow_demo("--json")
    guests = both_children(process)
    process.kill()
    process.communicate(timeout=TIMEOUT)
    wait_for(lambda: not any(alive(pid) for pid in guests))


def test_a_lost_destination_fails_the_demo() -> None:
    process = slow_demo()
    assert process.stderr is not None
    guests = both_children(process)
    line = ""
    while "active" not in line:
        line = process.stderr.readline()
        assert line, "the demo ended"
    [destination] = [pid for pid in guests if b"--incoming" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(destination, signal.SIGKILL)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 3
    assert "failed" in out
    assert not any(alive(pid) for pid in guests)
