"""The figures of KVM's dirty log for people, and for machines; and what of the goals they reach."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from sterna.bench.kvm.measure import ModeFigures, Sizes, Times
from sterna.bench.summary import Judgement
from sterna.bench.table import print_table
from sterna.host.units import format_size
from sterna.hypervisor.interface import DirtyLogMode

_GIB = 1 << 30
_TIMES = ("ours", "kernel", "own")
_SPARSE = "harvest, 1 % of all"
_MOST_PERCENT = 10.0
_MOST_MS = 5.0
_JUDGED = ("harvest, all", _SPARSE)
"""Calls that the kernel works in. A percentage of moments says nothing; and switching a log, it waits for its own readers."""


def goals_of(figures: Sequence[ModeFigures]) -> list[Judgement]:
    """What our calls are to take above the kernel's own time, on full-sized memory."""
    judged = []
    for one in figures:
        sparse = one.calls[_SPARSE]
        above = sparse.ms("own")
        judged.append(
            Judgement(
                f"dirty log, {one.mode}",
                f"harvest of {format_size(sparse.bytes)}, 1 % dirty: under {_MOST_MS:g} ms above the ioctl",
                f"{above:.2f} ms",
                above < _MOST_MS,
            )
        )
        for name in _JUDGED:
            if one.mode is DirtyLogMode.RING and name != _SPARSE:
                continue  # most of such a ring has been emptied when it was full
            times = one.calls[name]
            judged.append(
                Judgement(
                    f"dirty log, {one.mode}",
                    f"{name}: under {_MOST_PERCENT:g} % above the ioctl",
                    f"{times.overhead_percent:.1f} %, {times.ms('own'):.2f} ms",
                    times.overhead_percent < _MOST_PERCENT,
                )
            )
    return judged


def to_json(figures: Sequence[ModeFigures], missing: Mapping[str, str], sizes: Sizes) -> dict[str, Any]:
    """All figures; times in ms are medians.

    :param missing: ways to keep a log that this host has not, and why
    """
    return {
        "dense_bytes": sizes.dense_bytes,
        "sparse_bytes": sizes.sparse_bytes,
        "rounds": sizes.rounds,
        "missing": dict(missing),
        "modes": {
            one.mode.value: {
                "write_fault_us": dict(one.fault_us),
                "writes_per_second": dict(one.writes),
                "calls": {name: _call(times) for name, times in one.calls.items()},
            }
            for one in figures
        },
    }


def _call(times: Times) -> dict[str, Any]:
    return {
        "bytes": times.bytes,
        **{f"{which}_ms": times.ms(which) for which in _TIMES},
        "overhead_percent": times.overhead_percent,
        **{f"each_{which}_ms": [seconds * 1e3 for seconds in getattr(times, which)] for which in _TIMES},
    }


def print_report(
    console: Console, figures: Sequence[ModeFigures], missing: Mapping[str, str], sizes: Sizes
) -> None:
    """Tables of the calls and of the guest."""
    console.print(
        f"dirty log: {format_size(sizes.dense_bytes)} written by one vCPU; 1 % of all: of "
        f"{format_size(sizes.sparse_bytes)}; medians of {sizes.rounds}",
        soft_wrap=True,
        highlight=False,
    )
    for mode, why in missing.items():
        console.print(f"{mode}: {why}", soft_wrap=True, highlight=False)
    if figures:
        print_table(console, _CALLS, [_calls(one) for one in figures], labels=2)
        print_table(console, _GUEST, [[_guest(one) for one in figures]])


_CALLS = ("", "\n", "call\nms", "kernel\nms", "own\nms", "own\n%", "call\nms/GiB", "kernel\nms/GiB")
_GUEST = (
    *("", "write fault, us\nfirst pass", "write fault, us\nafter harvest"),
    *("writes/us\nno log", "writes/us\nlog", "writes/us\nharvested 10/s"),
)


def _calls(figures: ModeFigures) -> list[list[str]]:
    rows = []
    for number, (name, times) in enumerate(figures.calls.items()):
        gib = times.bytes / _GIB
        cells = [f"{times.ms(which):.2f}" for which in _TIMES]
        cells += [f"{times.overhead_percent:.0f}", *(f"{times.ms(who) / gib:.2f}" for who in _TIMES[:2])]
        rows.append(["" if number else figures.mode.value, name, *cells])
    return rows


def _guest(figures: ModeFigures) -> list[str]:
    faults = (f"{figures.fault_us[name]:.2f}" for name in ("first", "later"))
    writes = (f"{figures.writes[name] / 1e6:.2f}" for name in ("no log", "log", "harvests"))
    return [figures.mode.value, *faults, *writes]
