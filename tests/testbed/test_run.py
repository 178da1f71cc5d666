"""Every scenario that ships, reduced, with the emulated VM: and nothing is left behind."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from tests.cli.vms import TIMEOUT, alive, children, wait_for

from sterna.testbed import scenario
from sterna.testbed.journal import default_directory
from sterna.testbed.kind import KindOptions
from sterna.testbed.kinds import VM_KINDS
from sterna.testbed.settings import VmSettings

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "sterna", "testbed", "run", "--reduced"]
SOURCES = Path(__file__).parent.parent.parent / "src"
TIMED = {"clocks", "console", "downtime", "silence", "speed"}
"""Checks that a busy machine may fail; their judgement is tested in test_checks.py."""
NOT_EMULATED = {"ssh": "guests of the kind emulated have no ssh server"}
SLOW = """
title = "a migration that takes minutes"
[vm]
arguments = "2000 100 10"
[network]
rate = "400kbit"
[procedure]
kind = "migrate"
[[check]]
kind = "completed"
"""


def outside() -> dict[str, Any]:
    """What a run could leave on this machine."""
    temporary = {
        path.name for path in Path("/tmp").glob("sterna-testbed-*") if path.name != default_directory().name
    }
    return {
        "files": temporary,
        "notes": set(os.listdir(default_directory())) if default_directory().exists() else set(),
        "interfaces": set(os.listdir("/sys/class/net")),
        "swap": Path("/proc/swaps").read_text().count("sterna"),
        "mounts": Path("/proc/mounts").read_text().count("sterna"),
        # Whoever else makes groups may remove them meanwhile.
        "groups": {
            f"{above}/{name}"
            for above, names, _ in os.walk("/sys/fs/cgroup")
            for name in names
            if name.startswith("sterna-testbed-")
        },
    }


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*COMMAND, "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@functools.cache
def sound(name: str) -> dict[str, Any]:
    """The result of a scenario with nothing broken; run once."""
    _, report = run(name)
    [result] = report["results"]
    return dict(result)


@pytest.mark.parametrize("name", scenario.names())
def test_reduced(name: str) -> None:
    before = outside()
    result = sound(name)
    if name == "failover" and os.geteuid() != 0:
        assert result["outcome"] == "skipped"
        pytest.skip(result["reason"])
    if name in NOT_EMULATED:
        assert (result["outcome"], result["reason"]) == ("skipped", NOT_EMULATED[name])
        assert outside() == before
        return
    assert result["outcome"] in ("passed", "failed"), result["reason"]
    for finding in result["findings"]:
        assert finding["verdict"] != "failed" or finding["check"] in TIMED, finding
        assert finding["verdict"] != "skipped" or finding["check"] not in TIMED, finding
        assert finding["figure"]
    assert outside() == before


def test_reduced_on_versatile_express() -> None:
    kind = VM_KINDS.get("emulated-vexpress")(KindOptions())
    assert kind._config("vm", VmSettings(memory="16M", program="clock")).board.name == "vexpress-a15"
    _, report = run("migrate", "--vm", "emulated-vexpress")
    [result] = report["results"]
    for finding in result["findings"]:
        assert finding["verdict"] == "passed" or finding["check"] in TIMED, finding
    assert {finding["check"] for finding in result["findings"]} - TIMED


BREAKAGES = [
    ("skip-tlb-flush", "checksum", "audit", "was written and is not in the log"),
    ("forget-mark", "checksum", "audit", "page 0x40200000 (slot 0), sent in pass "),
    ("clear-after-copy", "checksum", "audit", "was written and is not in the log"),
    ("protect-short", "checksum", "audit", "page 0x404ff000 (slot 0), sent in pass "),
    ("drop-last-pass", "checksum", "audit", "was written and is not in the log"),
    ("forget-counter-offset", "timer", "clocks", "the guest's counter saw"),
    ("no-rebuild", "cancel", "huge-pages", "of 14 after the cancel"),
]  # fmt: skip
"""What is broken, the scenario that finds it, its check, and what that says."""


@pytest.mark.parametrize(("breakage", "name", "check", "told"), BREAKAGES)
def test_a_broken_hypervisor_is_found(breakage: str, name: str, check: str, told: str) -> None:
    code, report = run(name, "--breakage", breakage)
    assert code == 5
    assert report["results"][0]["note"].endswith(f"the emulated hypervisor has a fault: {breakage}")
    [found] = [finding for finding in report["results"][0]["findings"] if finding["check"] == check]
    assert found["verdict"] == "failed"
    assert told in "\n".join(found["problems"])
    [healthy] = [finding for finding in sound(name)["findings"] if finding["check"] == check]
    if check in TIMED:
        # A busy machine may fail it, by far less.
        assert healthy["values"]["apart_ms"] < found["values"]["apart_ms"] / 10
    else:
        assert healthy["verdict"] == "passed"


def test_every_breakage_has_a_detector() -> None:
    from sterna.testing.broken import BREAKAGES as KNOWN

    assert sorted(KNOWN) == sorted(breakage for breakage, *_ in BREAKAGES)
    table = (Path(__file__).parent.parent.parent / "ARCHITECTURE.md").read_text()
    for breakage, name, check, _ in BREAKAGES:
        assert re.search(rf"\| `{breakage}` \|.*`{name}`.*`{check}`", table), breakage


def test_a_lost_write_is_told_and_the_guest_stays() -> None:
    _, report = run("checksum", "--breakage", "protect-short")
    [record] = report["results"][0]["evidence"]["passages"]
    assert record["info"]["status"] == "failed"
    assert (
        "a write was lost: page 0x404ff000 (mach-virt.ram page 1279, slot 0)" in record["info"]["error-desc"]
    )
    [lost] = record["info"]["x-sterna"]["audit"]["lost"]
    assert lost["positions"]
    checks = {finding["check"]: finding for finding in report["results"][0]["findings"]}
    assert checks["completed"]["verdict"] == "failed"
    assert checks["digest"]["verdict"] == "skipped"  # it was found long before


@pytest.mark.parametrize("audit", [False, True])
def test_any_scenario_can_be_audited(audit: bool) -> None:
    _, report = run("timer", *(["--audit"] if audit else []))
    [result] = report["results"]
    audits = [record["info"]["x-sterna"].get("audit") for record in result["evidence"]["passages"]]
    assert [told is not None for told in audits] == [audit] * len(audits)


@pytest.mark.parametrize("breakage", ["protect-short"])
def test_nobody_gets_a_fault_who_did_not_ask_for_it(breakage: str, cli: Any) -> None:
    """Neither the environment nor the command line of `sterna run` knows them."""
    code, _, err = cli("run", "--kernel", "clock", "--accel", f"broken:{breakage}")
    assert code == 2
    assert f"accel: 'broken:{breakage}' is not known; choose emulated or kvm" in err


def test_a_guest_with_a_network_card_needs_root(root: None) -> None:
    before = outside()
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", *COMMAND, "--json", "failover"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    [result] = json.loads(done.stdout)["results"]
    assert done.returncode == 7
    assert result["outcome"] == "skipped"
    assert result["reason"].endswith("needs a tap in a network namespace; run as root")
    assert outside() == before


@pytest.mark.qemu
@pytest.mark.parametrize("name", ["date", "timer", "failover"])
def test_reduced_with_qemu(name: str) -> None:
    for finding in with_qemu(name)["findings"]:
        assert finding["verdict"] == "passed" or finding["check"] in TIMED, finding


@pytest.mark.qemu
def test_a_qemu_that_loses_writes_is_found_and_given_ram_with_which_it_does_not(tmp_path: Path) -> None:
    exact = with_qemu("checksum")
    audit, digest = (finding for finding in exact["findings"] if finding["check"] in ("audit", "digest"))
    if "loses writes" in exact["note"]:
        assert digest["verdict"] == "failed"
        # Where both ends differ, the source's RAM is not what it had sent.
        assert audit["verdict"] == "failed"
        assert audit["values"]["differ"] == digest["values"]["differ"]
        assert "some are not as they were sent: writes were lost" in audit["problems"][0]
        assert "pages of RAM differ" in digest["problems"][0]
    else:
        assert (audit["verdict"], digest["verdict"]) == ("passed", "passed")
    shipped = (SOURCES / "sterna/testbed/scenarios/checksum.toml").read_text()
    assert "exact-memory = true" in shipped
    own = tmp_path / "own.toml"
    own.write_text(shipped.replace("exact-memory = true", "exact-memory = false"))
    odd = with_qemu(str(own))
    assert odd["outcome"] == "passed", odd["findings"]
    [audit] = [finding for finding in odd["findings"] if finding["check"] == "audit"]
    assert audit["values"] == {"mib": 18, "differ": 0}
    assert odd["evidence"]["passages"][0]["info"]["ram"]["dirty-sync-count"] > 4


def with_qemu(name: str) -> dict[str, Any]:
    code, report = run(name, "--vm", "qemu")
    [result] = report["results"]
    if code == 7:
        if os.environ.get("STERNA_REQUIRE_QEMU") == "1":
            pytest.fail("qemu-system-arm is missing, and STERNA_REQUIRE_QEMU=1")
        pytest.skip(result["reason"])
    return dict(result)


def test_the_report_for_people_and_for_ci(tmp_path: Path) -> None:
    junit, html = tmp_path / "junit.xml", tmp_path / "report.html"
    done = subprocess.run(
        [*COMMAND, "checksum", "--junit", str(junit), "--html", str(html)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for expected in (
        "PASSED   checksum",
        "checksums of RAM are equal at both ends before the guest starts: 6 MiB compared",
        "1 scenarios, 4 checks",
        "no write is lost: the dirty log has every page that is not as it was sent: ",
        " 0 with lost writes",
    ):
        assert expected in done.stdout
    page = html.read_text()
    for expected in (
        "6 MiB compared",
        "Downtime by part",
        "RAM dirtied and sent per pass",
        "How often pages were sent",
    ):
        assert expected in page
    assert page.count("<svg") == 4
    [suite] = ElementTree.parse(junit).getroot()
    assert suite.get("tests") == "4"
    assert suite.get("failures") == suite.get("errors") == suite.get("skipped") == "0"
    assert [case.get("name") for case in suite] == ["completed", "audit", "digest", "content"]


def test_a_check_that_does_not_hold(tmp_path: Path) -> None:
    own, junit = tmp_path / "own.toml", tmp_path / "junit.xml"
    own.write_text(
        'title = "no time at all"\n[vm]\nmemory = "16M"\nprogram = "clock"\n[procedure]\nkind = "migrate"\n'
        '[[check]]\nkind = "downtime"\nlimit-ms = 0.001\n'
    )
    code, report = run(str(own), "--junit", str(junit))
    assert code == 5
    assert report["outcomes"]["failed"] == 1
    [finding] = report["results"][0]["findings"]
    assert "the limit is 0.001 ms" in finding["problems"][0]
    assert ElementTree.parse(junit).find("testsuite/testcase/failure") is not None


def test_a_guest_that_cannot_run_is_an_error(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'title = "arguments"\n[vm]\narguments = "1 2 3 4 5"\n[procedure]\nkind = "migrate"\n[[check]]\nkind = "completed"\n'
    )
    done = subprocess.run([*COMMAND, str(own)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert "5 arguments given" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing"], "no scenario 'nothing'"),
        (["date", "--vm", "xen"], "xen"),
        (["date", "--qemu", "x"], "--vm qemu"),
        (["date", "--vm-arguments", "it's"], '--vm-arguments "it\'s": no closing quotation'),
        (["date", "--breakage", "nonsense"], "no breakage 'nonsense'; there are skip-tlb-flush, forget-mark"),
        (["date", "--breakage", "no-rebuild", "--vm", "kvm"], "--breakage goes with --vm emulated"),
        (["date", "--junit", "/nonexistent/x.xml"], "--junit: cannot write /nonexistent/x.xml"),
        (["date", "--html", "/nonexistent/x.html"], "--html: cannot write /nonexistent/x.html"),
        (["date", "--html", "/"], "is a directory"),
        ([], "SCENARIO"),
    ],
)
def test_wrong_calls(arguments: list[str], told: str, cli: Any) -> None:
    code, _, err = cli("testbed", "run", *arguments)
    assert code == 2
    assert told in err


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("/nonexistent/qemu", "/nonexistent/qemu is not installed"),
        ("echo", "/echo does not tell that it is a QEMU: "),
    ],
)
def test_a_qemu_that_is_named_and_is_none(program: str, told: str, cli: Any) -> None:
    code, out, err = cli("testbed", "run", "date", "--vm", "qemu", "--qemu", program, "--json")
    assert code == 2
    assert told in err
    assert told in json.loads(out)["error"]


@pytest.fixture
def without_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A run that is skipped."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return ("testbed", "run", "date", "--vm", "qemu")


@pytest.mark.parametrize("option", ["--html", "--junit"])
def test_a_full_disk_is_told(option: str, cli: Any, without_qemu: tuple[str, ...]) -> None:
    code, _, err = cli(*without_qemu, option, "/dev/full")
    assert code == 1
    assert "cannot write /dev/full: No space left on device" in err


def test_a_report_that_was_there_stays_until_the_new_one_is_whole(
    tmp_path: Path, cli: Any, without_qemu: tuple[str, ...]
) -> None:
    report, fifo = tmp_path / "report.html", tmp_path / "fifo"
    report.write_text("an hour's work")
    os.mkfifo(fifo)
    code, _, err = cli(*without_qemu, "--html", str(report), "--junit", str(fifo))
    assert code == 2
    assert f"--junit: cannot write {fifo}: it is a named pipe, not a regular file" in err
    assert cli("testbed", "run", "nothing", "--html", str(report))[0] == 2
    assert report.read_text() == "an hour's work"
    held = report.open()
    assert cli(*without_qemu, "--html", str(report))[0] == 7
    assert held.read() == "an hour's work", "it was replaced, not written over"
    held.close()
    assert report.read_text().startswith("<!")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "fifo"}


def test_without_root_it_runs_on_loopback(root: None) -> None:
    # A user who is not root may neither read this tree nor its Python: what counts is what root can do.
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", *COMMAND, "date", "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout, done.stderr
    [result] = json.loads(done.stdout)["results"]
    assert result["outcome"] in ("passed", "failed"), result["reason"]
    assert "network namespaces need root: all hosts are on the loopback address" in result["note"]
    assert result["findings"][0]["check"] == "completed"
    assert result["findings"][0]["verdict"] == "passed"


def test_list(cli: Any) -> None:
    code, out, _ = cli("testbed", "list")
    assert code == 0
    for name in (*scenario.names(), "seed", "all"):
        assert f"\n{name} " in "\n" + out
    code, out, _ = cli("testbed", "list", "--json")
    assert [entry["name"] for entry in json.loads(out)["scenarios"]] == scenario.names()


@pytest.fixture
def slow(tmp_path: Path) -> "subprocess.Popen[str]":
    """A run in the middle of its migration."""
    path = tmp_path / "slow.toml"
    path.write_text(SLOW)
    process = subprocess.Popen(
        [*COMMAND, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "migration 1 of 1" in line:
            return process
    raise AssertionError("it ended early")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(number: int, slow: "subprocess.Popen[str]", root: None) -> None:
    before = outside()
    guests = children(slow.pid)
    assert len(guests) == 2
    assert before["notes"]
    slow.send_signal(number)
    _, err = slow.communicate(timeout=TIMEOUT)
    assert slow.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not any(alive(pid) for pid in guests)
    after = outside()
    assert not [note for note in after["notes"] if note.startswith(f"{slow.pid}-")]
    assert len(after["files"]) == len(before["files"]) - 1
    assert after["interfaces"] == before["interfaces"]


def test_a_killed_run_leaves_files_that_the_next_removes(
    slow: "subprocess.Popen[str]", root: None, cli: Any
) -> None:
    before = outside()
    guests = children(slow.pid)
    slow.kill()
    slow.communicate(timeout=TIMEOUT)
    wait_for(lambda: not any(alive(pid) for pid in guests))
    assert outside()["interfaces"] == before["interfaces"]
    assert [note for note in outside()["notes"] if note.startswith(f"{slow.pid}-")]
    code, out, _ = cli("testbed", "clean")
    assert code == 0
    assert "removed directory /tmp/sterna-testbed-" in out
    assert not [note for note in outside()["notes"] if note.startswith(f"{slow.pid}-")]
    assert len(outside()["files"]) < len(before["files"])
