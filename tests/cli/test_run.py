"""`sterna run`: its life and its end."""

import contextlib
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_bad_input import elf
from tests.cli.vms import TIMEOUT, pair, vm, wait_for

from sterna.jit import kernelcache
from sterna.monitor.client import ConnectionLost
from sterna.monitor.protocol import QmpError

pytestmark = pytest.mark.slow

GUEST = ("--kernel", "clock", "--append", "20", "--serial", "null")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with vm(tmp_path, "vm", *GUEST) as machine:
        assert machine.running()
        machine.process.send_signal(number)
        event = machine.qmp.wait_event(lambda e: e["event"] == "SHUTDOWN", TIMEOUT)
        assert event["data"] == {"guest": False, "reason": "host-signal"}
        assert machine.process.wait(TIMEOUT) == 0
        assert machine.errors() == ""
    assert not (tmp_path / "vm.qmp").exists()


PLACED = """
import importlib, os, signal, sys
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
place, number, *arguments = sys.argv[1:]
module, _, name = place.rpartition(".")
module = importlib.import_module(module)
called = getattr(module, name)

def signalled(*given, **named):
    os.kill(os.getpid(), int(number))
    return called(*given, **named)

setattr(module, name, signalled)
from sterna.cli import main
main(arguments)
"""
"""The command line, which gets a signal as it comes to a place."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        (
            "sterna.machine.hardware.open_vm",
            ("run", *GUEST[:-1], "unix:serial", "--memory", "16M", "--qmp", "unix:socket,server"),
        ),
        (
            "sterna.analysis.proxy.proxy.Recording",
            ("stream", "proxy", "unix:socket", "unix:destination", "--record", "record"),
        ),
    ],
)
def test_a_signal_before_there_is_anything_to_end_leaves_nothing(
    place: str, arguments: tuple[str, ...], number: signal.Signals, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLACED, place, str(int(number)), *arguments],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.stderr.strip(), done.returncode) == ("sterna: error: interrupted", 130)
    assert not list(tmp_path.iterdir())


def test_quit_is_answered_before_the_end(tmp_path: Path) -> None:
    with vm(tmp_path, "vm", *GUEST) as machine:
        assert machine.qmp.command("quit") == {}
        with pytest.raises(ConnectionLost):
            machine.qmp.command("query-status")
        assert machine.process.wait(TIMEOUT) == 0
        assert machine.errors() == ""


def test_a_monitor_whose_answers_are_lost_says_so_and_the_guest_goes_on(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sterna", "run", "--memory", "16M", *GUEST, "--monitor", "stdio"],
            input="info status\nquit\n",
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    assert done.stderr == (
        "sterna: error: standard output: No space left on device; what the monitor answers is lost\n"
    )
    assert done.returncode == 1, "ended by the last command"


def test_the_serial_line_is_standard_output(tmp_path: Path) -> None:
    with vm(tmp_path, "vm", "--kernel", "clock", "--append", "20") as machine:
        assert machine.process.stdout is not None
        assert b"clock" in machine.process.stdout.readline()
        assert machine.errors() == ""


def test_paused_waits_for_cont(tmp_path: Path) -> None:
    with vm(tmp_path, "vm", *GUEST, "--paused", "--name", "sleeper") as machine:
        assert machine.qmp.command("query-status")["status"] == "prelaunch"
        assert machine.qmp.command("query-name") == {"name": "sleeper"}
        machine.qmp.command("cont")
        assert machine.running()


def test_mem_prealloc_takes_all_memory_at_once(tmp_path: Path) -> None:
    # The test's own --memory comes later and wins.
    with vm(tmp_path, "vm", *GUEST, "--paused", "--memory", "600M", "--mem-prealloc") as machine:
        resident = Path(f"/proc/{machine.process.pid}/statm").read_text().split()[1]
        assert int(resident) * 4096 > 600 << 20


def broken_guest(tmp_path: Path) -> str:
    """A kernel whose first instruction is undefined, with no vectors to go to."""
    kernel = tmp_path / "broken.elf"
    # ldr r0, [pc, #0]; ldr r0, [r0]; the address is outside of everything.
    code = struct.pack("<III", 0xE59F0000, 0xE5900000, 0x3000_0000)
    image = elf(size=len(code))
    kernel.write_bytes(image[:84] + code)
    header = bytearray(kernel.read_bytes())
    struct.pack_into("<I", header, 52 + 16, len(code))
    kernel.write_bytes(bytes(header))
    return str(kernel)


def test_a_broken_guest_ends_it_with_a_report(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sterna", "run", "--memory", "16M", "--kernel", broken_guest(tmp_path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("sterna: error: the guest stopped: ")
    assert "0x30000000" in done.stderr
    assert "\nR00=" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_guest_stays_for_a_look_where_somebody_can(tmp_path: Path) -> None:
    with vm(tmp_path, "vm", "--kernel", broken_guest(tmp_path), "--serial", "null") as machine:
        wait_for(lambda: machine.qmp.command("query-status")["status"] == "internal-error")
        assert "0x30000000" in machine.qmp.command("query-status")["x-sterna-error"]
        machine.qmp.command("quit")
        assert machine.process.wait(TIMEOUT) == 1
        assert "the guest stopped" in machine.errors()


def test_the_human_monitor_on_standard_input() -> None:
    lines = ["info status", "stop", "info status", "bogus", "info registers", "quit", ""]
    done = subprocess.run(
        [sys.executable, "-m", "sterna", "run", "--memory", "16M", "--kernel", "clock", "--monitor", "stdio"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    for expected in ("VM status: running", "VM status: paused", "unknown command: 'bogus'", "R00="):
        assert expected in done.stdout


def test_the_device_tree_is_written(tmp_path: Path, cli) -> None:
    file = tmp_path / "dtb"
    assert cli("run", "--kernel", "clock", "--append", "1000", "--dump-dtb", str(file)) == (0, "", "")
    data = file.read_bytes()
    assert data.startswith(b"\xd0\x0d\xfe\xed")
    assert b"1000\0" in data


def test_a_failed_incoming_migration_is_told_and_waited_out(tmp_path: Path) -> None:
    with vm(tmp_path, "vm", "--incoming", f"unix:{tmp_path}/in", "--serial", "null") as machine:
        import socket

        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(tmp_path / "in"))
            peer.sendall(random.Random(1).randbytes(64))
        wait_for(lambda: machine.errors().count("\n") == 2)
        waiting, failed = machine.errors().splitlines()
        assert waiting == f"sterna: waiting for a guest at unix:{tmp_path}/in"
        assert failed.startswith(
            f"sterna: incoming migration from the peer on unix:{tmp_path}/in failed: section 'header'"
        )
        assert failed.endswith(f"; waiting for another at unix:{tmp_path}/in")
        assert machine.qmp.command("query-status")["status"] == "inmigrate"


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with vm(tmp_path, "vm", *GUEST) as machine:
            machine.process.send_signal(signal.SIGHUP)
            machine.qmp.command("stop")
            assert machine.qmp.command("query-status")["status"] == "paused"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_comes_in_is_told(tmp_path: Path) -> None:
    """That it waits, from whom the guest comes, that the source cancelled, and what has become of it."""
    with pair(tmp_path) as (source, destination):
        uri = destination.incoming_uri()
        wait_for(lambda: destination.errors() == f"sterna: waiting for a guest at {uri}\n")
        source.qmp.command("migrate-set-parameters", max_bandwidth=4096)
        source.qmp.command("migrate", uri=uri)
        wait_for(lambda: source.qmp.command("query-migrate")["status"] == "active")
        source.qmp.command("migrate_cancel")
        wait_for(lambda: destination.errors().count("\n") == 3)
        _, comes, failed = destination.errors().splitlines()
        assert comes.startswith("sterna: a guest comes in from tcp:127.0.0.1:")
        whence = comes.rpartition(" ")[2]
        text = f"the source cancelled the migration; waiting for another at {uri}"
        assert failed == f"sterna: incoming migration from {whence} failed: {text}"
        wait_for(lambda: source.qmp.command("query-migrate")["status"] == "cancelled")
        assert source.errors() == ""
        source.qmp.command("migrate-set-parameters", max_bandwidth=0)
        source.qmp.command("migrate", uri=uri)
        wait_for(lambda: destination.errors().count("\n") == 5)
        *_, here = destination.errors().splitlines()
        assert here.startswith("sterna: the guest from tcp:127.0.0.1:")
        assert here.endswith(" is here: running")
        wait_for(
            lambda: source.errors() == f"sterna: the guest has migrated to {uri}: end this one with 'quit'\n"
        )


def test_a_source_that_dies_is_not_said_to_have_cancelled(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        source.qmp.command("migrate-set-parameters", max_bandwidth=4096)
        source.qmp.command("migrate", uri=destination.incoming_uri())
        wait_for(lambda: source.qmp.command("query-migrate")["status"] == "active")
        source.process.kill()
        wait_for(lambda: destination.errors().count("\n") == 3)
        assert "the source gave it up or ended, or the connection broke; waiting" in destination.errors()


def test_a_machine_that_is_told_later_where_to_wait_says_so(tmp_path: Path) -> None:
    with vm(tmp_path, "vm", "--incoming", "defer", "--serial", "null") as machine:
        assert machine.errors() == "sterna: waiting for 'migrate_incoming URI' to say where\n"


def test_a_listening_socket_can_be_passed_on(tmp_path: Path) -> None:
    import socket

    from sterna.monitor.addresses import parse_address
    from sterna.monitor.client import QmpClient

    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sterna",
                "run",
                "--memory",
                "16M",
                *GUEST,
                "--qmp",
                f"fd:{listener.fileno()}",
            ],
            pass_fds=[listener.fileno()],
        )
        address = parse_address(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
    # The connection waits in the backlog until the machine is there.
    with QmpClient.connect(address, TIMEOUT) as client:
        assert client.command("query-status")["running"] is True
        client.command("quit")
    assert process.wait(TIMEOUT) == 0


@pytest.mark.parametrize(
    ("uri", "stdin", "expected"),
    [
        ("exec:false", b"", "cut short"),
        ("file:/etc/passwd", b"", "no migration stream"),
        ("file:/dev/zero", b"", "no migration stream"),
        ("fd:0", bytes(range(7, 200)) * 30, "no migration stream"),
    ],
)
def test_a_source_that_cannot_come_back_ends_it(uri: str, stdin: bytes, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sterna", "run", "--memory", "16M", "--incoming", uri],
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    waiting, failed = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert waiting == f"sterna: waiting for a guest from {uri}"
    assert failed.startswith("sterna: incoming migration failed: ")
    assert expected in failed


def test_pipes_hold_nothing_up(tmp_path: Path) -> None:
    """Neither a migration nor a command waits for whoever might open the other end; a signal ends the process."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with vm(tmp_path, "vm", *GUEST) as machine:
        machine.qmp.command("migrate", uri=f"file:{fifo}")
        wait_for(lambda: machine.qmp.command("query-migrate")["status"] == "failed")
        with pytest.raises(QmpError, match="it is a named pipe, not a regular file"):
            machine.qmp.command("pmemsave", val=0x4000_0000, size=4096, filename=str(fifo))
        assert machine.running()
        machine.process.send_signal(signal.SIGTERM)
        assert machine.process.wait(TIMEOUT) == 0
    for arguments in (
        ["--incoming", f"file:{fifo}"],
        [*GUEST, "--dump-dtb", str(fifo)],
        [*GUEST[:-2], "--serial", f"file:{fifo}"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "sterna", "run", "--memory", "16M", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("sterna: error: ")
        assert done.stderr.count("\n") == 1
        assert str(fifo) in done.stderr
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_reading_a_pipe_that_nobody_writes_can_be_ended(number: signal.Signals, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(
        [sys.executable, "-m", "sterna", "stream", "info", str(fifo)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        writers: list[int] = []

        def is_being_read() -> bool:
            try:
                writers.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # nobody reads it yet
                return False
            return True

        wait_for(is_being_read)
        process.send_signal(number)
        assert process.wait(TIMEOUT) != 0
    os.close(writers[0])


def test_a_failure_at_once_is_told_and_somebody_may_look(tmp_path: Path) -> None:
    with vm(tmp_path, "vm", "--incoming", "exec:false", "--serial", "null") as machine:
        wait_for(lambda: machine.errors().count("\n") == 2)
        waiting, failed = machine.errors().splitlines()
        assert waiting == "sterna: waiting for a guest from exec:false"
        assert failed.startswith("sterna: incoming migration failed: ")
        assert machine.qmp.command("query-migrate")["status"] == "failed"


def run_once(cache: Path, *arguments: str) -> str:
    """What `sterna run` says."""
    done = subprocess.run(
        [sys.executable, "-m", "sterna", "run", "--memory", "16M", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        timeout=600,
        check=False,
    )
    return done.stderr


@pytest.fixture
def all_but_two(tmp_path: Path) -> Path:
    """A cache with what an earlier run has compiled, but for two kernels: compiling all of it again would take long."""
    kept = kernelcache.cache_directory()
    kernels = tmp_path / "cache" / kept.name
    kernels.mkdir(0o700, parents=True)
    left_out = re.compile(r"\.|(stage2\.protect\.mark_range|memory\.shadow\._copy)-.*\.o$")
    for path in kept.iterdir():
        # Other processes write there: a file that begins with a dot is not whole, and one used least lately may go.
        if not left_out.match(path.name):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(path, kernels)
    return kernels.parent


NONE_CAME = "sterna: waiting for a guest from exec:false\nsterna: incoming migration failed: "


def test_compiling_is_said_once(all_but_two: Path) -> None:
    incoming = ("--incoming", "exec:false")
    assert run_once(all_but_two, *incoming).startswith(
        f"sterna: compiling kernels (once): 0 of 2\n{NONE_CAME}"
    )
    assert run_once(all_but_two, *incoming).startswith(NONE_CAME)


def test_how_far_it_is_is_shown_in_place_on_a_terminal(all_but_two: Path) -> None:
    ours, theirs = os.openpty()
    with open(ours, "rb") as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "sterna", "run", "--memory", "16M", "--incoming", "exec:false"],
            stdin=subprocess.DEVNULL,
            stderr=theirs,
            env={**os.environ, "XDG_CACHE_HOME": str(all_but_two)},
        )
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # that the other end is closed
            while piece := os.read(terminal.fileno(), 4096):
                shown += piece
        process.wait()
    steps = b"".join(b"\r\x1b[Ksterna: compiling kernels (once): %d of 2" % n for n in range(3))
    assert shown.startswith(steps + b"\r\n" + NONE_CAME.replace("\n", "\r\n").encode())


@pytest.mark.parametrize(
    "wrong",
    [
        ("--kernel", "/nowhere/kernel.elf"),
        ("--kernel", "clock", "--serial", "file:/nowhere/serial"),
        ("--kernel", "clock", "--qmp", "unix:/nowhere/qmp,server"),
        ("--kernel", "clock", "--memory", "1P"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_compiled(wrong: tuple[str, ...], tmp_path: Path) -> None:
    said = run_once(tmp_path, *wrong)
    assert said.startswith("sterna: error: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_qemu_sent_and_is_not_here_is_said(tmp_path: Path, qemu: str) -> None:
    """On standard error, in the monitor and for machines; and what matters is a refusal that says what to do."""
    firmware, stream = tmp_path / "firmware", tmp_path / "stream"
    firmware.write_bytes(b"\x55" * 4096)
    identity = "11111111-2222-3333-4444-555555555555"
    machine = [
        *[
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
            "-monitor",
            "stdio",
        ],
        "-uuid",
        identity,
    ]
    subprocess.run(
        [qemu, *machine, "-bios", str(firmware)],
        input=f'migrate "exec:cat > {stream}"\nquit\n',
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    arguments = (
        "run",
        "--memory",
        "16M",
        "--uuid",
        identity,
        "--incoming",
        f"file:{stream}",
        "--serial",
        "null",
    )
    done = subprocess.run(
        [sys.executable, "-m", "sterna", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 1
    assert "RAM block 'virt.flash0' is not here" in done.stderr
    assert "x-sterna-ignore-sections" in done.stderr
    with vm(tmp_path, "vm", *arguments[1:], "--ignore-section", "virt.flash0") as here:
        wait_for(lambda: here.qmp.command("query-migrate")["status"] == "completed")
        assert here.qmp.command("query-uuid") == {"UUID": identity}
        left = {one["name"]: one for one in here.qmp.command("query-migrate")["x-sterna"]["left-behind"]}
        assert left["pl031"]["fields"]["im"] == 0
        assert [name for name, one in left.items() if one["ignored"]] == ["virt.flash0"]
        wait_for(lambda: "left behind: RAM block virt.flash1" in here.errors())
        assert "sterna: left behind: pl031, 51 bytes: at reset" in here.errors()
        report = here.qmp.command("human-monitor-command", command_line="info migrate")
        assert "left behind: pl031 (51 bytes, " in report
