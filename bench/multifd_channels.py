"""How long a guest stands still by the number of multifd channels, part by part.

    python bench/multifd_channels.py [--rounds N] [CHANNELS ...]

Each round migrates a guest that dirties memory between two processes, once with each number of channels, 0 being without multifd;
the table has medians over the rounds in ms. The guest leaves little for the last pass, so what grows from line to line is the
price of a channel.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from sterna.guests.layout import STATUS_OFFSET
from sterna.host.load import HostWatch
from sterna.launch.command import sterna_arguments
from sterna.launch.process import SternaProcess
from sterna.launch.watch import wait_warm, watch
from sterna.machine.config import MachineConfig

MACHINE = MachineConfig(memory_bytes=64 << 20, kernel="dirtyram", append="8000 20 20")
WARM_UP_SECONDS = 300.0
CHANNELS = [0, 1, 8, 64, 255]


def migrate(channels: int) -> Mapping[str, Any]:
    """:return: what `query-migrate` says at the end"""
    with ExitStack() as stack:
        source = stack.enter_context(SternaProcess("source", sterna_arguments(MACHINE)))
        waiting = sterna_arguments(MACHINE, incoming="tcp:127.0.0.1:0")
        destination = stack.enter_context(SternaProcess("destination", waiting))
        for vm in (source, destination):
            vm.ready(lambda: None)
            capability = {"capability": "multifd", "state": channels > 0}
            vm.command("migrate-set-capabilities", capabilities=[capability])
            vm.command("migrate-set-parameters", **{"multifd-channels": max(1, channels)})
        wait_warm(source, MACHINE.board.ram_base + STATUS_OFFSET, WARM_UP_SECONDS, HostWatch())
        source.command("migrate", uri=destination.incoming_uri())
        query = partial(source.command, "query-migrate")
        info = watch(query, lambda info: None, lambda: time.sleep(0.05))
        assert info["status"] == "completed", info["error-desc"]
        return info


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("channels", nargs="*", type=int, default=CHANNELS)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    seen: dict[int, list[dict[str, Any]]] = {channels: [] for channels in arguments.channels}
    for _ in range(arguments.rounds):
        for channels, infos in seen.items():
            infos.append(migrate(channels))
    parts = list(next(iter(seen.values()))[0]["x-sterna"]["downtime-parts"])
    print(f"{'channels':>8}  {'downtime':>9}  " + "  ".join(f"{part:>12}" for part in parts))
    for channels, infos in seen.items():
        extras = [info["x-sterna"] for info in infos]
        row = [statistics.median(extra["downtime-parts"][part] for extra in extras) for part in parts]
        downtime = statistics.median(extra["downtime-ms"] for extra in extras)
        print(f"{channels:>8}  {downtime:>9.1f}  " + "  ".join(f"{value:>12.1f}" for value in row))


if __name__ == "__main__":
    main()
