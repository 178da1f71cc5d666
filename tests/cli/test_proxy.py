"""`sterna stream proxy` between two processes."""

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.cli.test_migrate import migrate
from tests.cli.vms import TIMEOUT, interrupt, pair, wait_for

from sterna.stream import sections

pytestmark = pytest.mark.slow


class ProxyProcess:
    """A proxy in a process of its own."""

    def __init__(self, directory: Path, destination: str, *options: str) -> None:
        self._errors = directory / "proxy.stderr"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sterna", "stream", "proxy", "tcp:127.0.0.1:0", destination, *options],
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        wait_for(lambda: "listening on" in self.errors() or self.process.poll() is not None)
        found = re.search(r"listening on (\S+),", self.errors())
        assert found, self.errors()
        self.uri = found[1]

    def errors(self) -> str:
        return self._errors.read_text()

    def result(self) -> tuple[int, str]:
        """Exit code and standard output."""
        out, _ = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, out.decode()


@contextmanager
def proxy(directory: Path, destination: str, *options: str) -> Iterator[ProxyProcess]:
    made = ProxyProcess(directory, destination, *options)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def test_a_migration_and_its_recording(tmp_path: Path, cli) -> None:
    record = tmp_path / "record"
    with pair(tmp_path) as (source, destination):
        with proxy(tmp_path, destination.incoming_uri(), "--json", "--record", str(record)) as between:
            done = migrate(source.address, between.uri, "--json", "--verify")
            assert done.returncode == 0, done.stderr
            code, out = between.result()
        assert destination.running()
    assert code == 0, between.errors()
    report = json.loads(out)
    result = json.loads(done.stdout)
    assert report["outcome"] == "completed"
    assert report["stream"]["ram_digest"]["all"] == result["ram_digest_destination"]
    assert report["return_path"]["RUNNING"] == 1
    assert [one["kind"] for one in report["connections"]] == ["main"]
    assert report["stream"]["bytes"] == report["forwarded_bytes"]
    assert {section["name"] for section in report["stream"]["sections"]} >= {"ram", "cpu", "arm_gic"}
    assert all(one["seconds"] >= 0 for one in report["stream"]["passes"])
    assert (report["flaw"], report["analysis_fault"], report["recording_fault"]) == (None, None, None)
    code, out, _ = cli("stream", "verify", str(record))
    assert code == 0
    assert f"ok: {report['forwarded_bytes']} bytes" in out
    assert cli("stream", "diff", str(record), str(record / "main.stream"))[0] == 0
    stored = json.loads(cli("stream", "info", "--digests", "--json", str(record))[1])
    assert stored["ram_digest"] == report["stream"]["ram_digest"]


def test_for_people(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination), proxy(tmp_path, destination.incoming_uri()) as between:
        assert migrate(source.address, between.uri).returncode == 0
        code, out = between.result()
    assert code == 0, between.errors()
    for text in (
        "Guest RAM",
        "Digests of RAM",
        "Passes in time",
        "RUNNING",
        "forwarding waited",
        "mach-virt.ram",
    ):
        assert text in out
    assert out.rstrip().endswith("completed")
    assert "\x1b" not in out + between.errors()
    assert "Traceback" not in between.errors()


def test_a_terminal_that_is_gone_costs_neither_the_migration_nor_the_report(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        command = [
            sys.executable,
            "-m",
            "sterna",
            "stream",
            "proxy",
            f"unix:{tmp_path}/proxy",
            destination.incoming_uri(),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stderr is not None
                while "listening on" not in (line := process.stderr.readline()):
                    assert line
                process.stderr.close()
                # Slow enough for lines to be written meanwhile.
                source.qmp.execute(
                    "migrate-set-parameters", {"max-bandwidth": 1_000_000, "downtime-limit": 5000}
                )
                assert migrate(source.address, f"unix:{tmp_path}/proxy").returncode == 0
                out = process.stdout.read()
                assert process.wait(TIMEOUT) == 0
            finally:
                process.kill()
    assert "Passes in time" in out
    assert out.rstrip().endswith("completed")


def test_interrupted(tmp_path: Path) -> None:
    record = tmp_path / "record"
    with pair(tmp_path) as (source, destination):
        # A young guest has touched little: its whole stream may take 80 KB, and is to be under way for long.
        source.qmp.command("migrate-set-parameters", **{"max-bandwidth": 5_000})
        with proxy(tmp_path, destination.incoming_uri(), "--json", "--record", str(record)) as between:
            source.qmp.command("migrate", uri=between.uri)
            stream = record / "main.stream"
            wait_for(lambda: record.exists() and sum(p.stat().st_size for p in record.iterdir()) > 10_000)
            assert not stream.exists(), "it has its name when it is complete"
            interrupt(between.process)
            code, out = between.result()
        assert code == 4, between.errors()
        report = json.loads(out)
        assert report["outcome"] == "cancelled"
        assert report["stream"]["fault"]["cut"] is True
        assert report["forwarded_bytes"] == stream.stat().st_size
        assert "sterna: error: cancelled: the proxy was interrupted" in between.errors()
        wait_for(lambda: source.qmp.command("query-migrate")["status"] == "failed")
        assert source.running()


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("name", ["", "toy.ram"])
def test_a_migration_that_breaks_before_its_first_page_is_reported(
    name: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    setup = (4096 | 4).to_bytes(8, "big") + bytes((len(name),)) + name.encode() + (4096).to_bytes(8, "big")
    stream = (
        sections.header(sections.Configuration("toy-1.0")) + sections.section_start(2, "ram", 0, 4) + setup
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        proxy(tmp_path, f"tcp:127.0.0.1:{server.getsockname()[1]}", *options) as between,
    ):
        with socket.create_connection(("127.0.0.1", int(between.uri.rpartition(":")[2]))) as near:
            near.sendall(stream)
            far, _ = server.accept()
        with far:
            while far.recv(1 << 16):
                pass
        code, _ = between.result()
    assert "Traceback" not in between.errors()
    if name:
        assert code == 3
        assert "failed: the source closed the connection within the stream" in between.errors()
    else:
        assert code == 6
        assert "RAM block '': a name is 1 to 255 bytes" in between.errors()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_came(tmp_path: Path, number: signal.Signals) -> None:
    with proxy(tmp_path, "tcp:127.0.0.1:1") as between:
        between.process.send_signal(number)
        code, _ = between.result()
    assert code == 130
    assert "nothing: no migration came" in between.errors()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tcp:127.0.0.1:0", "exec:cat"], 2, "a proxy forwards between tcp:HOST:PORT and unix:PATH"),
        (["nowhere", "tcp:127.0.0.1:1"], 2, "is not a migration URI"),
        (["tcp::0", "tcp:127.0.0.1:0"], 2, "tcp:127.0.0.1:0: nobody can be connected to at port 0"),
        (
            ["tcp::4444", "tcp:127.0.0.1:4444"],
            2,
            "tcp:127.0.0.1:4444: that is where the proxy itself is to listen",
        ),
        (["tcp:192.0.2.1:5", "tcp:127.0.0.1:1"], 1, "cannot listen on tcp:192.0.2.1:5"),
        (
            ["tcp::0", "tcp:127.0.0.1:1", "--record", "/dev/null"],
            1,
            "/dev/null: it is a file; a recording needs",
        ),
    ],
)
def test_wrong_calls(cli, arguments: list[str], code: int, message: str) -> None:
    found, _, error = cli("stream", "proxy", *arguments)
    assert found == code
    assert error.startswith("sterna: error: ")
    assert message in error
    assert error.count("\n") == 1
