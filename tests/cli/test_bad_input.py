"""Wrong calls and missing things: one line that names what is wrong, exit code 2 for the call, 1 for the rest."""

import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from tests.refusal import refuse_threads

from sterna.cli import LazyGroup

RUN = ("run", "--kernel", "dirtyram")


def one_line(error: str) -> str:
    assert error.startswith("sterna: error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nope",), "nope"),
        (("run", "--nope"), "--nope"),
        (("run",), "--kernel"),
        ((*RUN, "--incoming", "defer"), "exclude"),
        ((*RUN, "--memory", "0"), "memory"),
        ((*RUN, "--memory", "-1"), "memory"),
        ((*RUN, "--memory", "64Q"), "64Q"),
        ((*RUN, "--memory", "67108865B"), "4096"),
        ((*RUN, "--memory", "100T"), "memory"),
        ((*RUN, "--memory", "9" * 400), "memory"),
        ((*RUN, "--memory", "1B"), "memory"),
        ((*RUN, "--smp", "0"), "smp"),
        ((*RUN, "--smp", "99"), "smp"),
        ((*RUN, "--smp", "two"), "two"),
        ((*RUN, "--machine", "pc"), "pc"),
        ((*RUN, "--cpu", "z80"), "z80"),
        ((*RUN, "--accel", "tcg"), "tcg"),
        ((*RUN, "--append", "garbage"), "garbage"),
        ((*RUN, "--append", "1 2"), "usage"),
        ((*RUN, "--append", "1 2 3 4 5"), "usage"),
        ((*RUN, "--append", "99999999 1 1"), "99999999"),
        ((*RUN, "--append", "\x1b[2J"), "append"),
        ((*RUN, "--append", "x" * 10_000), "append"),
        ((*RUN, "--qmp", "nonsense"), "nonsense"),
        ((*RUN, "--qmp", "tcp:localhost:port,server"), "port"),
        ((*RUN, "--qmp", "tcp::0,server"), "--qmp: tcp:127.0.0.1:0: nobody would learn which port that is"),
        ((*RUN, "--qmp", "unix:/tmp/x,frobnicate"), "frobnicate"),
        ((*RUN, "--monitor", "telnet"), "telnet"),
        ((*RUN, "--monitor", "stdio", "--serial", "stdio"), "both"),
        ((*RUN, "--serial", "tty"), "serial 'tty' is not known; choose stdio, file:PATH, unix:PATH or null"),
        ((*RUN, "--serial", ""), "serial '' is not known"),
        ((*RUN, "--serial", "file:"), "the path is missing"),
        ((*RUN, "--uuid", "12345678"), "12345678 is not 32 hexadecimal digits"),
        ((*RUN, "--ignore-section", "pl031"), "--incoming"),
        (("run", "--incoming", "garbage"), "garbage"),
        (("run", "--incoming", "tcp:1.2.3.4:99999"), "99999"),
        (("run", "--incoming", "carrier-pigeon:home"), "carrier-pigeon"),
        (("run", "--incoming", "fd:0", "--serial", "stdio"), "standard input"),
        ((*RUN, "--nic", "user"), "nic: 'user' is not known; write none, or a tap"),
        ((*RUN, "--nic", "tap,ifname=t", "--nic", "tap,ifname=t"), "two cards want the tap t"),
        ((*RUN, "--nic", "tap,ifname=t,mac=1"), "mac=1 is not six hexadecimal bytes"),
        (("run", "--kernel", "net", "--append", "10.0.0.1"), "it needs a network card: --nic"),
        (
            ("run", "--kernel", "net"),
            "it needs its IPv4 address, such as --append 10.83.9.1; usage: net ADDRESS",
        ),
        (("run", "--kernel", "net", "--append", "ten"), "ADDRESS is 'ten', not an IPv4 address"),
        (("migrate", "unix:/x"), "URI"),
        (("migrate", "unix:/x", "foo"), "'foo' is not a migration URI"),
        (("migrate", "unix:/x", "carrier-pigeon:home"), "carrier-pigeon"),
        (("migrate", "unix:/x", "tcp:1.2.3.4:0"), "tcp:1.2.3.4:0: nobody can be connected to at port 0"),
        (
            ("migrate", "unix:/x", "tcp:1.2.3.4:5", "--downtime-limit", "300h"),
            "--downtime-limit: '300h' is too long; it is at most 2000 s",
        ),
        (("demo", "--downtime-limit", "300h"), "2000 s"),
        (("migrate", "x", "tcp:1.2.3.4:5"), "monitor address"),
        (("migrate", "unix:/x", "tcp:1.2.3.4:5", "--bandwidth", "fast"), "fast"),
        (("migrate", "unix:/x", "tcp:1.2.3.4:5", "--downtime-limit", "soon"), "soon"),
        (("migrate", "unix:/x", "tcp:1.2.3.4:5", "--set", "x"), "NAME=VALUE"),
        (
            ("migrate", "unix:/x", "tcp:1.2.3.4:5", "--set", "frob=1"),
            "no migration parameter or capability 'frob'",
        ),
        (("migrate", "unix:/x", "tcp:1.2.3.4:5", "--set", "downtime=1"), "there is 'downtime-limit'"),
        (
            ("migrate", "unix:/x", "tcp:1.2.3.4:5", "--set", "multifd=2"),
            "--set 'multifd=2': Parameter 'multifd' expects 'on' or 'off'",
        ),
        (
            ("migrate", "unix:/x", "tcp:1.2.3.4:5", "--set", "x-sterna-audit=maybe"),
            "Parameter 'x-sterna-audit' expects 'on' or 'off'",
        ),
        (("migrate", "unix:/x", "tcp:1.2.3.4:5", "--set", "downtime-limit=long"), "downtime-limit"),
        (("stream", "info", ""), "Invalid value for 'FILE': the path is empty"),
        (("stream", "diff", "x", ""), "Invalid value for 'RIGHT': the path is empty"),
        (("stream", "verify", "x", "--channel", ""), "Invalid value for '--channel': the path is empty"),
        (("stream", "digest", "memory="), "expected BLOCK=FILE"),
        (("migrate", "unix:/x", "file:"), "the path is missing"),
        (("demo", "--kernel", "/bin/true"), "/bin/true"),
        (("demo", "--kernel", "net"), "the demo knows dirtyram, clock, random; 'net' is none of them"),
        (("demo", "--memory", "64M"), "PAGES"),
        (("demo", "--append", "1 2 x"), "x"),
        (("demo", "--smp", "0"), "smp"),
        (
            ("testbed", "run", "date", "--vm", "qemu", "--qemu", "/nonexistent/qemu"),
            "--qemu: /nonexistent/qemu is not installed",
        ),
        (
            ("testbed", "run", "date", "--vm", "qemu", "--qemu", "/bin/true"),
            "does not tell that it is a QEMU",
        ),
        (
            ("testbed", "run", "date", "--vm", "vmware"),
            "'emulated', 'emulated-vexpress', 'kvm', 'qemu', 'qemu-linux'",
        ),
    ],
)
def test_wrong_calls(cli, arguments: tuple[str, ...], expected: str) -> None:
    code, out, error = cli(*arguments)
    assert expected in one_line(error)
    assert code == 2
    assert out == ""


def commands(group: click.Group) -> Iterator[click.Command]:
    """The commands of a group, and those of the groups in it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield from commands(command) if isinstance(command, click.Group) else [command]


def test_no_path_may_be_empty() -> None:
    """An empty one is the current directory to Python, or as if nothing had been said."""
    paths = [
        parameter
        for command in commands(LazyGroup())
        for parameter in command.params
        if isinstance(parameter.type, click.Path) or parameter.metavar in ("FILE", "PATH", "DIR")
    ]
    assert {"file", "channels", "record", "qemu", "dump_dtb", "html", "tree"} <= {one.name for one in paths}
    for parameter in paths:
        with pytest.raises(click.BadParameter, match="the path is empty"):
            parameter.type.convert("", parameter, None)


@pytest.mark.parametrize("command", [("run", "--kernel", "clock"), ("demo",)])
@pytest.mark.parametrize("option", ["--machine", "--accel", "--dirty-log"])
def test_what_an_error_offers_the_help_has_too(cli, command: tuple[str, ...], option: str) -> None:
    _, _, error = cli(*command, option, "pc")
    offered = set(one_line(error).rpartition("choose ")[2].split()) - {"or"}
    asked = LazyGroup().get_command(click.Context(LazyGroup()), command[0])
    assert asked is not None
    [told] = [one.help for one in asked.params if isinstance(one, click.Option) and option in one.opts]
    assert len(offered) > 1
    assert offered <= set(re.findall(r"[\w-]+", told or ""))


def elf(machine: int = 40, bits: int = 1, kind: int = 2, address: int = 0x4030_0000, size: int = 4) -> bytes:
    """A little ELF executable with one segment."""
    header = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    header += struct.pack("<HHIIIIIHHHHHH", kind, machine, 1, address, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    return header + struct.pack("<IIIIIIII", 1, 84, address, address, 4, size, 5, 4) + b"\xfe\xff\xff\xea"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "ELF"),
        (b"#!/bin/sh\n", "ELF"),
        (b"\x7fELF", "ELF"),
        (elf()[:60], "ELF"),
        (elf(machine=62), "EM_X86_64"),
        (elf(bits=2), "ELF"),
        (elf(kind=3), "ET_DYN"),
        (elf(address=0x1000), "outside RAM"),
        (elf(address=0xFFFF_FFF0), "outside RAM"),
        (elf(size=0x7FFF_FFFF), "outside RAM"),
        (elf(address=0x4000_0000), "device tree"),
        (random.Random(1).randbytes(4096), "ELF"),
    ],
)
def test_wrong_kernels(cli, tmp_path: Path, content: bytes, expected: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(content)
    code, _, error = cli("run", "--kernel", str(kernel))
    assert expected in one_line(error)
    assert str(kernel) in error
    assert code == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [("run", "--kernel", "clock"), ("demo",)])
@pytest.mark.parametrize(
    ("accel", "board"),
    [("emulated", "pc-min"), ("kvm", "pc-min" if os.uname().machine != "x86_64" else "virt")],
)
def test_a_machine_that_cannot_be_here_is_refused_before_anything_is_compiled(
    command_line,
    command: tuple[str, ...],
    accel: str,
    board: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, error = command_line(*command, "--accel", accel, "--machine", board)
    assert f"accel {accel}: " in one_line(error)
    assert (code, out) == (7, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kernel", ["/nonexistent/kernel.elf", "/", "/dev/zero", "dirtyrom", ""])
def test_missing_kernels(cli, kernel: str) -> None:
    code, _, error = cli("run", "--kernel", kernel)
    assert kernel in one_line(error)
    assert code in (1, 2)


def test_taps_that_cannot_be(cli) -> None:
    code, _, error = cli(*RUN, "--nic", "tap,fd=9999")
    assert "descriptor 9999 is not a tap" in one_line(error)
    assert code == 1
    code, _, error = cli(*RUN, "--nic", "tap,ifname=lo")
    assert "cannot open" in one_line(error)
    assert code == 1


def test_taken_ports(cli, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket(socket.AF_UNIX) as other:
        port = taken.getsockname()[1]
        other.bind(str(tmp_path / "taken"))
        other.listen()
        for arguments in (
            (*RUN, "--qmp", f"tcp:127.0.0.1:{port},server"),
            (*RUN, "--qmp", f"unix:{tmp_path}/taken,server"),
            ("run", "--incoming", f"tcp:127.0.0.1:{port}"),
        ):
            code, _, error = cli(*arguments)
            assert "in use" in one_line(error)
            assert code == 1


def test_unknown_hosts_and_unreachable_places(cli, tmp_path: Path) -> None:
    for arguments in (
        (*RUN, "--qmp", "tcp:host.invalid:1,server"),
        ("run", "--incoming", "tcp:host.invalid:1"),
        ("migrate", "tcp:host.invalid:1", "tcp:127.0.0.1:1"),
        (*RUN, "--qmp", f"unix:{tmp_path}/missing/qmp,server"),
        ("migrate", f"unix:{tmp_path}/missing", "tcp:127.0.0.1:1"),
        (*RUN, "--serial", f"file:{tmp_path}/missing/log"),
        (*RUN, "--dump-dtb", f"{tmp_path}/missing/dtb"),
    ):
        code, _, error = cli(*arguments)
        assert "invalid" in one_line(error) or "missing" in error
        assert code == 1


def test_migrate_to_what_is_not_a_monitor(cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        peer = socket.socket()
        with peer:
            # Answers as soon as it is connected: the backlog holds the connection, the data waits in ours.
            def talk() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"220 mail.example ESMTP\r\n")

            thread = threading.Thread(target=talk)
            thread.start()
            code, _, error = cli("migrate", address, "tcp:127.0.0.1:1")
            thread.join()
    assert "does not speak QMP" in one_line(error)
    assert code == 1


@pytest.mark.slow
def test_a_process_of_its_own_gives_no_traceback_either(command_line) -> None:
    code, out, error = command_line("run", "--kernel", "/nonexistent")
    assert code == 1
    assert out == ""
    assert "/nonexistent" in one_line(error)


@pytest.mark.parametrize(
    "arguments",
    [
        (*RUN, "--append", "x" * 3000),
        (*RUN, "--append=" + "7 " * 1500),
        (*RUN, "--append", "\"'" * 1500),
        (*RUN, "--smp", "y" * 3000),
        ("run", "--kernel", "z" * 3000),
        ("migrate", "unix:/x", "w" * 3000),
        ("--" + "v" * 3000,),
    ],
)
def test_long_input_is_not_echoed_in_whole(cli, arguments: tuple[str, ...]) -> None:
    code, _, error = cli(*arguments)
    assert len(one_line(error)) < 400
    assert code in (1, 2)


@pytest.mark.parametrize(
    ("arguments", "thread", "expected"),
    [
        (
            ("run", "--kernel", "clock", "--memory", "16M", "--serial", "null"),
            "vcpu0",
            "cannot make the machine",
        ),
        (("stream", "proxy", "unix:{}/near", "unix:{}/far"), "proxy-accept", "cannot be waited at"),
    ],
)
def test_a_host_without_a_thread_to_spare(
    cli, arguments: tuple[str, ...], thread: str, expected: str, tmp_path: Path, monkeypatch
) -> None:
    refuse_threads(monkeypatch, thread)
    code, _, error = cli(*(text.format(tmp_path) for text in arguments))
    assert re.search(f"^sterna: error: .*{expected}: can't start new thread$", error.splitlines()[-1])
    assert code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected", "code"),
    [
        (("migrate", "--json", "unix:/nonexistent/qmp", "tcp:127.0.0.1:1"), "cannot connect", 1),
        (("migrate", "--json", "nonsense", "tcp:127.0.0.1:1"), "monitor address", 2),
        (("migrate", "--json", "unix:/x", "foo"), "URI", 2),
        (("demo", "--json", "--machine", "pc"), "pc", 2),
        (("demo", "--json", "--smp", "two"), "two", 2),
        (("doctor", "--json", "--nope"), "--nope", 2),
        (("stream", "info", "--json"), "FILE", 2),
        (("stream", "digest", "--json", "x"), "BLOCK=FILE", 2),
        (("stream", "proxy", "--json", "x", "y"), "'x'", 2),
        (("testbed", "run", "--json", "nothing"), "no scenario 'nothing'", 2),
        (("testbed", "list", "--json", "x"), "unexpected extra argument", 2),
        (("bench", "--json", "nothing"), "no workload 'nothing'", 2),
    ],
)
def test_an_early_error_is_json_where_that_was_asked_for(
    cli, arguments: tuple[str, ...], expected: str, code: int
) -> None:
    got, out, error = cli(*arguments)
    assert got == code
    assert expected in one_line(error)
    assert out.count("\n") == 1
    report = json.loads(out)
    assert report["status"] == "error"
    assert error == f"sterna: error: {report['error']}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--help",),
        ("stream",),
        ("testbed", "list"),
        ("testbed", "list", "--json"),
        ("bench", "--list"),
        ("stream", "digest", "memory={0}"),
        ("stream", "digest", "--json", "memory={0}"),
    ],
)
def test_a_full_standard_output_is_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(4096))
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sterna", *(text.format(memory) for text in arguments)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert one_line(done.stderr) == "sterna: error: standard output: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.slow
def test_an_error_is_told_where_no_output_can_be_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sterna", "stream", "info", "--json", f"{tmp_path}/missing"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert "No such file" in one_line(done.stderr)
        assert done.returncode == 2
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, check=False)
        assert "No such file" in json.loads(done.stdout)["error"]
        assert done.returncode == 2
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as broken:
        done = subprocess.run(
            [*command[:3], "testbed", "list"], stdout=broken, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.stderr, done.returncode) == ("", 1)


CLOSE = 'exec {}; exec "$0" -m sterna "$@"'


@pytest.mark.parametrize(
    "arguments",
    [
        ("stream", "digest", "memory={memory}"),
        ("stream", "digest", "--json", "memory={memory}"),
        ("testbed", "list"),
    ],
)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_if_nobody_looked(
    arguments: tuple[str, ...], closed: str, tmp_path: Path
) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(4096))
    done = subprocess.run(
        ["sh", "-c", CLOSE.format(closed), sys.executable]
        + [text.format(memory=memory) for text in arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert bool(done.stdout) == (">&-" not in closed.split())


def test_an_error_is_no_output_where_standard_error_is_closed() -> None:
    done = subprocess.run(
        ["sh", "-c", CLOSE.format("2>&-"), sys.executable, "run", "--nope"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("", 2)


def test_no_descriptor_gets_the_number_of_a_closed_standard_input() -> None:
    done = subprocess.run(
        ["sh", "-c", CLOSE.format("<&-"), sys.executable, "migrate", "fd:0", "tcp:127.0.0.1:1"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert "fd:0: Socket operation on non-socket" in one_line(done.stderr)
    assert done.returncode == 1


def test_an_error_is_one_line_that_no_terminal_obeys(cli, tmp_path: Path) -> None:
    _, _, error = cli("migrate", f"unix:{tmp_path}/\x1b[2J\x07", "tcp:127.0.0.1:1")
    assert "\\x1b[2J\\x07" in one_line(error)
    assert error.removesuffix("\n").isprintable()
