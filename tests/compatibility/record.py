"""``python -m tests.compatibility.record VERSION``: streams of an earlier version, kept in tests/data/VERSION/.

Each is a live migration between two machines of that version, recorded by its own proxy: the main stream, the channels of
multifd, and what that version's `stream info` said of them.
"""

import argparse
import json
import subprocess
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.compatibility.version import COMMITS, ROOT, VersionVm, environment, program, sources

from sterna.host.pythonprogram import module_command

MEMORY = "8M"


@dataclass(frozen=True)
class Case:
    """A migration that is recorded.

    :ivar machine: arguments of both machines
    :ivar guest: arguments of the source
    :ivar capabilities: at both ends
    :ivar parameters: at both ends
    """

    machine: tuple[str, ...] = ("--smp", "2")
    guest: tuple[str, ...] = ("--kernel", "dirtyram", "--append", "60 4 5")
    capabilities: tuple[str, ...] = ()
    parameters: dict[str, object] = field(default_factory=dict)


CASES = {
    "virt": Case(),
    "vexpress-a15": Case(machine=("--machine", "vexpress-a15")),
    "pc-min": Case(machine=("--accel", "kvm", "--smp", "2")),
    "clock": Case(machine=("--uuid", "6f1c0c2e-4f07-4b0b-9d0e-0d1ad29a1b4e"), guest=("--kernel", "clock")),
    "xbzrle": Case(parameters={"x-sterna-policy": "adaptive"}),
    "multifd-none": Case(capabilities=("multifd",)),
    "multifd-zlib": Case(capabilities=("multifd",), parameters={"multifd-compression": "zlib"}),
    "multifd-zstd": Case(capabilities=("multifd",), parameters={"multifd-compression": "zstd"}),
}


def record(case: Case, source: Path, directory: Path) -> None:
    """Migrate, and leave ``main.stream``, ``channel-N.stream`` and ``info.json`` in a directory."""
    listening, waiting = (f"unix:{directory}/{name}" for name in ("proxy", "destination"))
    machine = (*case.machine, "--memory", MEMORY)
    with (
        VersionVm("source", (*machine, *case.guest), source) as here,
        VersionVm("destination", (*machine, "--incoming", "defer"), source) as there,
    ):
        for vm in (here, there):
            vm.ready()
            for name in case.capabilities:
                vm.command("migrate-set-capabilities", capabilities=[{"capability": name, "state": True}])
            own = {"x-sterna-verify": "on", "x-sterna-policy": "fixed", "max-bandwidth": 4 << 20}
            vm.command("migrate-set-parameters", **(own | case.parameters))
        there.command("migrate-incoming", uri=waiting)
        time.sleep(0.5)  # the guest has written some pages
        proxy = subprocess.Popen(
            module_command(
                "sterna", "stream", "proxy", listening, waiting, "--record", str(directory / "streams")
            ),
            env=environment(source),
        )
        while not (directory / "proxy").is_socket():
            time.sleep(0.05)
        here.command("migrate", uri=listening)
        assert proxy.wait() == 0
        assert here.command("query-migrate")["status"] == "completed"
    done = program(source, "stream", "info", "--json", "--digests", str(directory / "streams"))
    assert done.returncode == 0, done.stderr
    (directory / "streams" / "info.json").write_text(json.dumps(json.loads(done.stdout), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility.record", description=__doc__)
    parser.add_argument("version", choices=COMMITS)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without")
    options = parser.parse_args()
    kept = ROOT / "tests" / "data" / options.version
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        source = sources(options.version)
        for case in options.cases or CASES:
            directory = Path(name) / case
            directory.mkdir()
            record(CASES[case], source, directory)
            with tarfile.open(kept / f"{case}.tar.xz", "w:xz") as archive:
                for path in sorted((directory / "streams").iterdir()):
                    archive.add(path, path.name)
            print(f"{case}: {(kept / f'{case}.tar.xz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
