"""How long a guest stands still by the number of multifd channels, part by part.

    python bench/multifd_channels.py [--rounds N] [CHANNELS ...]

Each round migrates a guest that dirties memory between two processes, once with each number of channels, 0 being without multifd;
the table has medians over the rounds in ms. The guest leaves little for the last pass, so what grows from line to line is the
price of a channel.
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from typing import Any

from sterna.boards.virt import BOARD as VIRT
from sterna.guests.layout import STATUS_OFFSET
from sterna.launch.guestview import guest_status, has_warmed_up
from sterna.launch.process import SternaVm

MEMORY = "64M"
GUEST = ["--kernel", "dirtyram", "--append", "8000 20 20"]
CHANNELS = [0, 1, 8, 64, 255]


def migrate(channels: int) -> dict[str, Any]:
    """:return: what `query-migrate` says at the end"""
    with ExitStack() as stack:
        source = stack.enter_context(SternaVm("source", ["--memory", MEMORY, *GUEST]))
        incoming = ["--memory", MEMORY, "--incoming", "tcp:127.0.0.1:0"]
        destination = stack.enter_context(SternaVm("destination", incoming))
        for vm in (source, destination):
            vm.ready(lambda: None)
            capability = {"capability": "multifd", "state": channels > 0}
            vm.command("migrate-set-capabilities", capabilities=[capability])
            vm.command("migrate-set-parameters", **{"multifd-channels": max(1, channels)})
        while (status := guest_status(source, VIRT.ram_base + STATUS_OFFSET)) is None or not has_warmed_up(
            status
        ):
            time.sleep(0.1)
        [address] = destination.command("query-migrate")["socket-address"]
        source.command("migrate", uri=f"tcp:{address['host']}:{address['port']}")
        while (info := source.command("query-migrate"))["status"] not in ("completed", "failed"):
            time.sleep(0.05)
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
