"""The table of README.md: python bench/figures.py [--qemu PATH]... [--write]

Measures sterna and the QEMU that is installed, and then each QEMU that is named, with the same guests. Nothing else should use
the machine meanwhile; how busy it was is told at the end. A cell has the plain variant; the quickest other one, where that is
quicker or the plain one does not converge; and where sterna throttled the guest, what it does when it must not. Figures are
medians: total time, downtime, bytes, the guest's speed meanwhile, and the most that it was throttled.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sterna.host.load import HostWatch

README = Path(__file__).parent.parent / "README.md"
WORKLOADS = {
    "idle-zero": "idle, RAM never touched",
    "idle-random": "idle, random RAM",
    "dirty-1g": "`{guest}`, 1 Gbit/s",
    "random-25-1g": "`{guest}`, 1 Gbit/s: 25 MB/s that cannot be compressed",
    "random-70-1g": "`{guest}`, 1 Gbit/s: 70 MB/s that cannot be compressed",
    "hard-1g": "`{guest}`, 1 Gbit/s",
}
_UNTHROTTLED = "sterna unthrottled"
VARIANTS = {
    "sterna": ("sterna", _UNTHROTTLED, "sterna multifd"),
    "qemu": ("qemu", "qemu multifd", "qemu xbzrle", "qemu auto-converge", "qemu xbzrle auto-converge"),
}
_TABLE = re.compile(r"\| guest \| sterna \|.*?\n\n", re.DOTALL)

Rows = Mapping[str, Mapping[str, Any]]
"""By variant, what `sterna bench --json` gives of it."""


def measure(qemu: str | None, who: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """One run of `sterna bench`, its notes on standard error."""
    command = [sys.executable, "-m", "sterna", "bench", "--json", "--runs", str(options.runs), *WORKLOADS]
    command += [part for one in who for variant in VARIANTS[one] for part in ("--only", variant)]
    command += ["--qemu", qemu] if qemu else []
    command += ["--memory", options.memory] if options.memory else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    result: dict[str, Any] = json.loads(done.stdout)
    if "workloads" not in result:
        sys.exit(f"{' '.join(command)}: {result.get('error')}")
    return result


def cell(rows: Rows, names: Sequence[str]) -> str:
    """The plain variant in words, and those that are told beside it."""
    plain, *others = (rows[name] for name in names if name in rows and name != _UNTHROTTLED)
    done = [one for one in others if one["median"]["seconds"] is not None]
    best = min(done, key=lambda one: float(one["median"]["seconds"]), default=None)
    told = [plain]
    if best and (
        plain["median"]["seconds"] is None or best["median"]["seconds"] < plain["median"]["seconds"]
    ):
        told.append(best)
    if plain["median"]["throttle_percent"] and _UNTHROTTLED in names:
        told.append(rows[_UNTHROTTLED])
    return "; ".join(f"{one['variant'].partition(' ')[2]} {in_words(one)}".strip() for one in told)


def in_words(row: Mapping[str, Any]) -> str:
    """One variant's medians."""
    median = row["median"]
    if median["seconds"] is None:
        return "not within a minute" if row["outcome"] == "did not converge" else str(row["outcome"])
    size = median["bytes"]
    told = f"{median['seconds']:.2g} s, {median['downtime_ms']:.0f} ms, "
    scale, unit = next((one for one in ((1e9, "GB"), (1e6, "MB")) if size >= one[0] / 10), (1e3, "kB"))
    told += f"{size / scale:.{0 if size >= 10 * scale else 1}f} {unit}"
    if median["guest_speed"] is not None:
        told += f", guest {100 * median['guest_speed']:.0f} %"
    if median["throttle_percent"]:
        told += f" (throttled by {median['throttle_percent']:.0f} %)"
    return told


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """:param results: of `measure`: sterna beside the first QEMU, then other QEMUs alone"""
    heads, columns = ["sterna"], [("sterna", results[0])]
    for result in results:
        if result["qemu"]:
            heads.append(f"QEMU {result['qemu']['version']}")
            columns.append(("qemu", result))
    lines = [f"| guest | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, title in WORKLOADS.items():
        cells = []
        for who, result in columns:
            [workload] = (one for one in result["workloads"] if one["name"] == name)
            rows = {row["variant"]: row for row in workload["results"]}
            cells.append(cell(rows, VARIANTS[who]))
        guest = next(one["guest"] for one in results[0]["workloads"] if one["name"] == name)
        lines.append(f"| {title.format(guest=guest)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qemu", action="append", default=[], metavar="PATH", help="another QEMU")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", help="of all guests, to try this program out")
    parser.add_argument(
        "--write", action="store_true", help="into README.md, in the place of the table there"
    )
    options = parser.parse_args()
    watch = HostWatch()
    results = [measure(None, ("sterna", "qemu"), options)]
    results += [measure(path, ("qemu",), options) for path in options.qemu]
    made = table(results)
    print(made)
    print(watch.load(), file=sys.stderr)
    if options.write:
        README.write_text(_TABLE.sub(lambda _: made + "\n", README.read_text(), count=1))


if __name__ == "__main__":
    main()
