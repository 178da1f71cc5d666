"""The human monitor on a real machine."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.monitor.machines import Monitored, monitored
from tests.monitor.qmpserver import TIMEOUT

from sterna.guests.layout import STATUS_MAGIC
from sterna.monitor.dump import DumpFormat, dump, parse_expression
from sterna.monitor.hmp import HumanMonitor
from sterna.monitor.report import migration_report
from sterna.testing.conformance.backends import KvmX86


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Monitored]:
    with monitored(tmp_path / "qmp", smp=2) as running:
        yield running


@pytest.fixture
def human(vm: Monitored) -> HumanMonitor:
    return HumanMonitor(vm.control)


def test_the_run_state(human) -> None:
    assert human.execute("info status") == "VM status: paused (prelaunch)\n"
    assert human.execute("c") == ""
    assert human.execute("info status") == "VM status: running\n"
    assert human.execute("stop") == ""
    assert human.execute("info status") == "VM status: paused\n"


def test_cpus_and_registers(human) -> None:
    assert re.fullmatch(r"\* CPU #0: thread_id=\d+\n  CPU #1: thread_id=\d+\n", human.execute("info cpus"))
    assert human.execute("cpu 1") == ""
    assert human.execute("info cpus").startswith("  CPU #0")
    assert human.execute("info registers").startswith("\nCPU#1\nR00=")
    assert human.execute("info registers", cpu=0).startswith("\nCPU#0\n")
    assert human.execute("info registers -a").count("PSR=") == 2
    for number in ("2", "-1", "0000000009", "\u00b2", "0" * 4000, ""):
        assert "not the index of a CPU" in human.execute(f"cpu {number}")


def test_no_name_of_a_peers_makes_a_line_of_the_report() -> None:
    left = {"name": "a\nVERIFIED", "instance-id": 0, "nbytes": 1, "digest": "b", "reason": "c"}
    own = {"left-behind": [left], "ram-digest-destination": "d\nVERIFIED"}
    lines = migration_report({"status": "completed", "x-sterna": own}).splitlines()
    assert lines == [
        "Migration status: completed",
        "ram digest destination: d\\nVERIFIED",
        "left behind: a\\nVERIFIED (1 bytes, b): c",
    ]


@pytest.mark.kvm
def test_a_machine_on_kvm(tmp_path: Path, human) -> None:
    assert human.execute("info kvm") == "kvm support: disabled\n"
    if why := KvmX86().missing():
        pytest.skip(why)
    with monitored(tmp_path / "kvm", accel="kvm") as other:
        on_kvm = HumanMonitor(other.control)
        assert on_kvm.execute("info kvm") == "kvm support: enabled\n"
        assert "blocks 2m" in on_kvm.execute("info stage2")
        with other.server.client() as client:
            assert client.command("query-kvm")["enabled"]
            assert [cpu["target"] for cpu in client.command("query-cpus-fast")] == ["x86_64"]


def test_memory(vm: Monitored, human) -> None:
    data = vm.machine.ram_blocks[0].data
    data[0:8] = range(0xF0, 0xF8)
    assert human.execute("xp /2wx 0x40000000") == "0000000040000000: 0xf3f2f1f0 0xf7f6f5f4\n"
    assert human.execute("xp/1gx 1073741824") == "0000000040000000: 0xf7f6f5f4f3f2f1f0\n"
    assert human.execute("xp /4xb 0x40000000 + 2") == "0000000040000002: 0xf2 0xf3 0xf4 0xf5\n"
    assert "not in RAM" in human.execute("xp /4wx 0")
    assert human.execute("xp").splitlines()[0] == "unexpected end of expression"
    assert human.execute("xp /zz 0").splitlines()[0] == "invalid char in format: 'z'"
    assert "can be shown" in human.execute("xp /999999gx 0x40000000")
    assert human.execute("xp /1gx 0x40200000") == f"0000000040200000: {STATUS_MAGIC:#018x}\n"


@pytest.mark.parametrize(
    ("text", "data", "expected"),
    [
        ("16xb", bytes(range(16)), 2),
        ("8xw", bytes(32), 2),
        ("4xg", bytes(32), 2),
        ("3xh", bytes(6), 1),
    ],
)
def test_lines_hold_sixteen_bytes_or_eight_single_ones(text: str, data: bytes, expected: int) -> None:
    assert dump(0, data, DumpFormat.parse(text)).count("\n") == expected


@pytest.mark.parametrize(
    ("text", "data", "expected"),
    [
        ("1wd", b"\xff\xff\xff\xff", "        -1"),
        ("1wu", b"\xff\xff\xff\xff", "4294967295"),
        ("1bo", b"\x09", "0011"),
        ("2bc", b"A\r", "'A' '\\r'"),
        ("1wc", b"'\\\x00z", "'\\'' '\\\\' '\\x00' 'z'"),
    ],
)
def test_formats(text: str, data: bytes, expected: str) -> None:
    layout = DumpFormat.parse(text)
    assert layout.total_bytes == len(data)
    assert dump(0, data, layout) == f"{0:016x}: {expected}\n"


def test_expressions() -> None:
    assert parse_expression("0x10 + 16-2") == 30
    for text in ("", "x", "1 2", "1 +", "0 - 1", "0x1ffffffffffffffff", "$pc"):
        with pytest.raises(ValueError):  # noqa: PT011 - each text has its own message
            parse_expression(text)


def test_settings_of_migrations(human) -> None:
    assert human.execute("migrate_set_parameter max-bandwidth 100") == ""
    assert "max-bandwidth: 104857600 bytes/second\n" in human.execute("info migrate_parameters")
    assert human.execute("migrate_set_parameter max-bandwidth 1g") == ""
    assert "max-bandwidth: 1073741824 bytes/second\n" in human.execute("info migrate_parameters")
    assert human.execute("migrate_set_parameter downtime-limit 20") == ""
    assert "downtime-limit: 20 ms\n" in human.execute("info migrate_parameters")
    assert human.execute("migrate_set_parameter max-bandwidth zz") == "Error: Invalid size zz\n"
    assert human.execute("migrate_set_parameter foo 1") == "Error: invalid parameter value: foo\n"
    assert human.execute("migrate_set_parameter downtime-limit soon").startswith("Error: ")
    assert human.execute("migrate_set_capability events on") == ""
    assert "events: on\n" in human.execute("info migrate_capabilities")
    assert human.execute("migrate_set_capability foo on") == "Error: invalid parameter value: foo\n"
    assert human.execute("migrate_set_capability events maybe").startswith("Expected 'on' or 'off'\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ""),
        ("   ", ""),
        ("foo", "unknown command: 'foo'\n"),
        ("info foo", "unknown command: 'info foo'\n"),
        (
            "stop 3",
            'stop|s: extraneous characters at the end of line\nTry "help stop" for more information\n',
        ),
        ("migrate", 'migrate: string expected\nTry "help migrate" for more information\n'),
        ("migrate -x a", 'migrate: unsupported option -x\nTry "help migrate" for more information\n'),
        ("migrate_incoming tcp:127.0.0.1:0", "Error: '-incoming' was not specified on the command line\n"),
        ("x" * 5000, "the line has more than 4096 characters\n"),
    ],
)
def test_wrong_lines(human, line: str, expected: str) -> None:
    assert human.execute(line) == expected


def test_help_lists_what_there_is(human) -> None:
    text = human.execute("help")
    for name in (
        "migrate",
        "migrate_cancel",
        "migrate_set_parameter",
        "info",
        "stop|s",
        "cont|c",
        "xp",
        "quit|q",
    ):
        assert f"\n{name} " in "\n" + text
    for name in ("migrate", "status", "stage2", "registers", "network"):
        assert f"info {name} " in human.execute("info")
    assert human.execute("help migrate").startswith("migrate [-d] uri -- ")
    assert human.execute("help info status").startswith("info status ")


def test_migrate_waits_in_the_foreground_and_others_may_cancel(vm: Monitored, tmp_path: Path) -> None:
    human = HumanMonitor(vm.control, foreground=True)
    human.execute("migrate_set_parameter max-bandwidth 4k")
    vm.machine.cont()
    with monitored(tmp_path / "qmp2", incoming=True, smp=2) as other:
        uri = f"unix:{tmp_path}/in"
        assert HumanMonitor(other.control).execute(f"migrate_incoming {uri}") == ""
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(human.execute(f"migrate {uri}")))
        thread.start()
        second = HumanMonitor(vm.control)
        while "status: active" not in second.execute("info migrate"):
            assert thread.is_alive()
        assert "total ram: 16384 kbytes\n" in second.execute("info migrate")
        second.execute("migrate_cancel")
        thread.join(TIMEOUT)
        assert answers == ["migration cancelled\n"]
        assert "Migration status: cancelled" in second.execute("info migrate")


def test_through_qmp_it_goes_on_in_the_background(vm: Monitored) -> None:
    with vm.server.client() as client:
        answer = client.command("human-monitor-command", command_line="info status")
        assert answer == "VM status: paused (prelaunch)\r\n"
        answer = client.command("human-monitor-command", command_line="migrate tcp:127.0.0.1:1")
        assert "continuing detached" in answer
        assert vm.migration.wait(TIMEOUT).error


def test_nothing_of_an_answer_is_for_the_terminal_to_obey(human) -> None:
    assert human.execute("\x1b[2J") == "unknown command: '\\x1b[2J'\n"
    assert "\n" in human.execute("info cpus")
