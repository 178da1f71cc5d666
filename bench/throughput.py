"""Raw migration throughput of an idle guest with random content, beside QEMU doing the same, alternating in one run.

    python bench/throughput.py [--json] [--rounds N] [--memory MIB]

Both sides: two processes on this host, TCP on loopback, anonymous RAM, no bandwidth limit, a stopped guest whose RAM but for
1/8 is random. The time is the migration's, as the source's query-migrate tells it. sterna runs twice, with and without
verification, which QEMU does not have.
"""

import argparse
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RAM = 0x4000_0000
UNLIMITED = 1 << 40


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Qmp:
    """A client of one connection."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        for _ in range(3000):
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self._socket.connect(str(path))
                break
            time.sleep(0.01)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


def random_bytes(size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 1 << 64, size // 8, dtype=np.uint64).view(np.uint8)


def source_child(uri: str, mebibytes: int, verify: str) -> None:
    """A machine with random RAM, migrated once; prints its query-migrate."""
    from sterna.machine.config import MachineConfig
    from sterna.machine.machine import Machine
    from sterna.migration.controller import MigrationController

    machine = Machine(MachineConfig(memory_bytes=mebibytes << 20, paused=True))
    data = machine.ram_blocks[0].data
    data[4 << 20 :][: data.size * 7 // 8] = random_bytes(data.size * 7 // 8)[: data.size - (4 << 20)]
    with MigrationController(machine, lambda name, data: None) as migration:
        migration.set_parameters({"max-bandwidth": 0, "x-sterna-verify": verify})
        migration.migrate(uri)
        print(json.dumps(migration.wait().to_qmp()), flush=True)
    machine.close()


@contextlib.contextmanager
def process(command: list[str], **arguments: Any) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(command, text=True, **arguments)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def run_sterna(folder: Path, mebibytes: int, verify: str) -> dict[str, Any]:
    qmp = folder / "sterna.sock"
    qmp.unlink(missing_ok=True)
    port = free_port()
    uri = f"tcp:127.0.0.1:{port}"
    destination = [sys.executable, "-m", "sterna", "run", "--memory", f"{mebibytes}M", "--incoming", uri]
    with process([*destination, "--paused", "--qmp", f"unix:{qmp},server", "--serial", "null"]):
        Qmp(qmp)
        child = subprocess.run(
            [sys.executable, __file__, "--source-child", uri, str(mebibytes), verify],
            capture_output=True,
            text=True,
            check=True,
        )
    return dict(json.loads(child.stdout))


def run_qemu(folder: Path, mebibytes: int) -> dict[str, Any]:
    image = folder / "random.bin"
    if not image.exists():
        image.write_bytes(random_bytes((mebibytes << 20) * 7 // 8).tobytes())
    machine = ["qemu-system-arm", "-M", "virt", "-cpu", "cortex-a15", "-m", str(mebibytes), "-nodefaults"]
    machine += ["-display", "none", "-S", "-qmp"]
    source, destination = folder / "source.sock", folder / "destination.sock"
    for path in (source, destination):
        path.unlink(missing_ok=True)
    uri = f"tcp:127.0.0.1:{free_port()}"
    loader = ["-device", f"loader,file={image},addr={RAM + (4 << 20):#x},force-raw=on"]
    with (
        process([*machine, f"unix:{destination},server=on,wait=off", "-incoming", uri]),
        process([*machine, f"unix:{source},server=on,wait=off", *loader]),
    ):
        Qmp(destination)
        qmp = Qmp(source)
        qmp("migrate-set-parameters", **{"max-bandwidth": UNLIMITED})
        qmp("migrate", uri=uri)
        while True:
            info = qmp("query-migrate")
            if info.get("status") in ("completed", "failed"):
                return dict(info)
            time.sleep(0.02)


def main() -> None:
    if sys.argv[1:2] == ["--source-child"]:
        source_child(sys.argv[2], int(sys.argv[3]), sys.argv[4])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5, help="migrations behind each median")
    parser.add_argument("--memory", type=int, default=2048, help="guest RAM in MiB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides: dict[str, Callable[[], dict[str, Any]]] = {
            "sterna": lambda: run_sterna(folder, arguments.memory, "off"),
            "sterna verified": lambda: run_sterna(folder, arguments.memory, "auto"),
        }
        if shutil.which("qemu-system-arm"):
            sides["qemu"] = lambda: run_qemu(folder, arguments.memory)
        else:
            print("qemu-system-arm is not installed: no comparison", file=sys.stderr)
        rates: dict[str, list[float]] = {side: [] for side in sides}
        downtimes: dict[str, list[float]] = {side: [] for side in sides}
        names = list(sides)
        for number in range(arguments.rounds):
            # Each goes first as often as last: memory that a process has just given back is quicker to get.
            first = number % len(names)
            for side in names[first:] + names[:first]:
                info = sides[side]()
                if info["status"] != "completed":
                    raise SystemExit(f"{side}: {info}")
                rates[side].append(info["ram"]["transferred"] / info["total-time"] / 1e6)
                downtimes[side].append(info["downtime"])
    result = {
        side: {
            "GB/s": round(statistics.median(rates[side]), 3),
            "all": [round(rate, 3) for rate in rates[side]],
            "downtime ms": statistics.median(downtimes[side]),
        }
        for side in sides
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for side, row in result.items():
        print(f"{side:16} {row['GB/s']:6.2f} GB/s   of {row['all']}   downtime {row['downtime ms']:.0f} ms")


if __name__ == "__main__":
    main()
