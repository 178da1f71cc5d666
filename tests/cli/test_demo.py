"""`sterna demo`, end to end, with a small guest."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.cli.vms import TIMEOUT, alive, children, interrupt, wait_for

from sterna.cli.demoreport import report_lines
from sterna.cli.demorun import DemoSettings
from sterna.host.load import HostLoad
from sterna.machine.config import MEBIBYTE, MachineConfig

pytestmark = pytest.mark.slow

needs_kvm = pytest.mark.skipif(
    platform.machine() != "x86_64" or not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no KVM of ours"
)
COMMAND = [sys.executable, "-m", "sterna", "demo"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--append", "2000 100 10", "--memory", "64M"),
        ("--append", "2000 100 5", "--memory", "32M", "--smp", "2", "--bandwidth", "200Mbit"),
        ("--kernel", "random", "--append", "3 1000 8", "--memory", "32M"),
        # There is so little of it that it would be gone before it has written anything.
        ("--kernel", "clock", "--memory", "16M", "--machine", "vexpress-a15", "--bandwidth", "40kB"),
    ],
)
def test_verified(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*COMMAND, "--json", *arguments], capture_output=True, text=True, timeout=600, check=False
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
    assert result["host"]["cpus"] == os.cpu_count()


def test_report_for_people() -> None:
    done = subprocess.run(
        [*COMMAND, "--append", "500 20 5", "--memory", "16M"],
        capture_output=True,
        text=True,
        timeout=600,
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


@pytest.mark.parametrize("accel", ["emulated", pytest.param("kvm", marks=needs_kvm)])
def test_an_audited_demo_says_so(accel: str) -> None:
    arguments = [*COMMAND, "--append", "500 20 5", "--memory", "16M", "--accel", accel, "--audit"]
    done = subprocess.run([*arguments, "--json"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout)
    audit = result["audit"]
    # Each pass ends with one; after a pass of a few pages there is another.
    assert audit["harvests"] >= len(result["passes"])
    assert audit["lost-pages"] == 0
    assert audit["lost"] == []
    assert audit["pages-judged"] > 0
    assert 0 < audit["longest-hold-ms"] <= audit["held-ms"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)
    assert re.search(
        r"audit         \d+ pages compared after \d+ harvests?, 0 with lost writes; the guest was\s+held for",
        done.stdout,
    )


def slow_demo(*arguments: str) -> "subprocess.Popen[str]":
    """A demo whose migration takes most of a minute."""
    return subprocess.Popen(
        [*COMMAND, "--append", "2000 100 10", "--memory", "64M", "--bandwidth", "4kB", *arguments],
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
    assert "cancelled: nothing was migrated, both machines have been ended" in out
    assert "runs on at the source" not in out
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


def test_a_throttled_guest_is_told() -> None:
    # Its 16 MB are dirty again after each pass, more than fits the downtime, also when it gets little of the machine: a pass
    # takes 0.8 s, in which it would write them ten times. Throttled by 95 %, it writes for 10 ms in 200: in ten steps it writes
    # less than the link carries, however fast it is.
    arguments = ("--append", "4000 90 1", "--memory", "64M", "--bandwidth", "20MB", "--policy", "fixed")
    done = subprocess.run(
        [*COMMAND, "--json", *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    result = json.loads(done.stdout)
    assert result["status"] == "completed", result
    assert result["throttle_percent"] >= 60
    assert result["guest_gap_exact"] is False
    settings = DemoSettings(
        MachineConfig(memory_bytes=64 * MEBIBYTE, kernel="dirtyram", append="4000 90 1"),
        bandwidth=20_000_000,
        downtime_limit_ms=300,
        auto_converge=True,
    )
    report = report_lines(result, settings)
    text = " ".join(" ".join(report).split())
    assert f"throttled to {100 - result['throttle_percent']} %" in text
    assert f"up to {result['guest_gap_ms']:.1f} ms" in text
    assert max(map(len, report)) <= 100


SMALL = DemoSettings(MachineConfig(memory_bytes=16 * MEBIBYTE, kernel="clock"), 0, 300, auto_converge=True)
HOST = HostLoad(2, 5.0, 0.75, 0.0, None)


def test_a_check_that_fails_says_how_busy_the_host_was() -> None:
    told = f"  {'':<14}{HOST}"
    assert told not in report_lines(finished(2), SMALL)
    problem = "the guest's counter saw 900.0 ms, the downtime was 20.0 ms"
    report = report_lines(finished(2) | {"verified": False, "problems": [problem]}, SMALL)
    assert report[-3:] == [f"  {'problem':<14}{problem}", told, "NOT VERIFIED"]


def record(pages: int, left: int) -> dict[str, float]:
    return {"pages": pages, "bytes": pages * 4096, "ms": 12.5, "dirty_pages_after": left}


def finished(passes: int) -> dict[str, Any]:
    """What `run_demo` gives of a small clock that migrated in no time."""
    return {
        "status": "completed", "error": None, "verified": True, "problems": [], "total_ms": 0.4,
        "transferred_bytes": 4096, "downtime_ms": 0.2, "predicted_downtime_ms": 0.3, "throttle_percent": 0,
        "audit": None, "host": asdict(HOST), "clock_note": "x " * 80,
        "passes": [record(1, 1) for _ in range(passes)],
        "ram_digest_source": "0" * 32, "ram_digest_destination": "0" * 32,
        "guest_gap_ms": 5.0, "guest_gap_exact": False,
        "stage2": {"before": {"blocks_dissolved": 0}, "during": {}, "after": {"blocks_dissolved": 1, "faults_permission": 2}},
        "guest": {"steps_before": 10**15, "steps_after": 10**16, "pages_checked": 0, "backward_steps": 0},
    }  # fmt: skip


@pytest.mark.parametrize(("passes", "rows", "elided"), [(8, 8, None), (9, 9, None), (10, 8, "2 more passes")])
def test_the_report_counts_right_and_is_not_wide(passes: int, rows: int, elided: str | None) -> None:
    config = MachineConfig(memory_bytes=16 * MEBIBYTE, kernel="clock", append="1 " * 60)
    report = report_lines(finished(passes), DemoSettings(config, 0, 300, auto_converge=True))
    text = "\n".join(report)
    assert sum(line.startswith("  pass ") for line in report) == rows
    assert ("more passes" in text) == (elided is not None)
    assert elided is None or elided in text
    for expected in ("1 CPU,", "1 page ", "1 block dissolved", "2 write faults", "0 leaves", "in 0.4 ms, "):
        assert expected in text
    assert "its clock never stepped back" in text
    assert "pages checked" not in text
    assert max(map(len, report)) <= 100


def test_help_tells_of_the_throttle(cli) -> None:
    code, out, _ = cli("demo", "--help")
    assert code == 0
    assert "throttled" in out
    assert "--no-auto-converge" in out
