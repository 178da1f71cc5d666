"""The report of `sterna demo` for people."""

import textwrap
from collections.abc import Mapping
from typing import Any

from sterna.cli.demorun import DemoSettings, demo_outcome_line
from sterna.cli.display import format_seconds
from sterna.host.load import HostLoad
from sterna.host.units import counted, format_rate, format_size

_WIDTH = 100
_LABEL_WIDTH = 14
_PASSES_SHOWN = 8


def report_lines(result: Mapping[str, Any], settings: DemoSettings) -> list[str]:
    """:param result: of `run_demo`
    :return: lines of `_WIDTH` columns at most
    """
    config = settings.config
    limit = f"{format_rate(settings.bandwidth)}" if settings.bandwidth else "no bandwidth limit"
    title = (
        f"{config.kernel} {config.append}".strip()
        + f" on {config.machine}, {counted(config.smp, 'CPU')}, "
        + f"{format_size(config.memory_bytes)}, {config.accel}, {limit}"
    )
    lines = textwrap.wrap(title, _WIDTH)
    if result["status"] != "completed":
        return [*lines, *textwrap.wrap(demo_outcome_line(result), _WIDTH)]
    seconds = max(result["total_ms"], 0.001) / 1000
    rows = [
        ("migrated", f"in {format_seconds(seconds)}, {format_size(result['transferred_bytes'])} sent, "
         f"{format_rate(result['transferred_bytes'] / seconds)}"),
        *_pass_rows(result["passes"]),
        ("downtime", f"{result['downtime_ms']:.1f} ms, {result['predicted_downtime_ms'] or 0:.1f} ms predicted; "
         f"by the guest's own counter {_gap(result)}"),
        ("stage 2", _stage2_row(result["stage2"])),
        ("RAM digest", f"{result['ram_digest_source']} at the source"),
        ("", f"{result['ram_digest_destination']} at the destination"),
        ("guest", _guest_row(result["guest"])),
    ]  # fmt: skip
    if result["audit"]:
        rows.append(("audit", _audit_row(result["audit"])))
    if result["throttle_percent"]:
        taken = result["throttle_percent"]
        text = f"the guest was throttled to {100 - taken} % ({taken} % of its time taken) for it to converge"
        rows.append(("auto-converge", text))
    if result["clock_note"]:
        rows.append(("clocks", result["clock_note"]))
    if result["problems"]:
        rows += [("problem", problem) for problem in result["problems"]]
        rows.append(("", str(HostLoad(**result["host"]))))
    return [*lines, *_table(rows), "VERIFIED" if result["verified"] else "NOT VERIFIED"]


def _pass_rows(passes: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """One row per pass; of many, the first and the last few."""
    rows = [
        (
            f"pass {number}",
            f"{record['pages']:>7} page{' ' if record['pages'] == 1 else 's'}, "
            f"{format_size(record['bytes']):>10}, {record['ms']:>8.1f} ms, "
            f"{record['dirty_pages_after']:>6} dirtied meanwhile",
        )
        for number, record in enumerate(passes, 1)
    ]
    if len(rows) <= _PASSES_SHOWN + 1:
        return rows  # a row that says that one was left out takes as much room
    half = _PASSES_SHOWN // 2
    return [*rows[:half], ("...", f"{len(rows) - 2 * half} more passes"), *rows[-half:]]


def _gap(result: Mapping[str, Any]) -> str:
    if result["throttle_percent"]:
        return f"up to {result['guest_gap_ms']:.1f} ms, with what the throttle took before the switchover"
    return f"{'' if result['guest_gap_exact'] else 'at most '}{result['guest_gap_ms']:.1f} ms"


def _stage2_row(stage2: Mapping[str, Mapping[str, int]]) -> str:
    before, during, after = stage2["before"], stage2["during"], stage2["after"]
    if "faults_permission" not in after:
        # KVM counts what is mapped, not why.
        return (
            f"{counted(before.get('blocks_2m', 0), 'block')} before, "
            f"{counted(during.get('blocks_2m', 0), 'block')} and "
            f"{counted(during.get('pages_4k', 0), 'page')} while it was logged"
        )

    def grown(name: str) -> int:
        return after.get(name, 0) - before.get(name, 0)

    leaves = grown("pages_protected") + grown("blocks_protected")
    return (
        f"{counted(grown('faults_permission'), 'write fault')}, "
        f"{counted(grown('blocks_dissolved'), 'block')} dissolved, "
        f"{leaves} {'leaf' if leaves == 1 else 'leaves'} protected"
    )


def _audit_row(audit: Mapping[str, Any]) -> str:
    return (
        f"{audit['pages-judged']} pages compared after {counted(audit['harvests'], 'harvest')}, "
        f"{audit['lost-pages']} with lost writes; the guest was held for {audit['held-ms']:.1f} ms, "
        f"at most {audit['longest-hold-ms']:.1f} ms at once"
    )


def _guest_row(guest: Mapping[str, int]) -> str:
    """What was checked of the program: its pages, or of a program without any its clock."""
    back = guest["backward_steps"]
    checked = f"its clock stepped back {counted(back, 'time')}" if back else "its clock never stepped back"
    if guest["pages_checked"]:
        checked = f"{counted(guest['pages_checked'], 'page')} checked against its counters; {checked}"
    return (
        f"{checked}; step {guest['steps_before']} at the source, "
        f"{guest['steps_after']} at the destination and going on"
    )


def _table(rows: list[tuple[str, str]]) -> list[str]:
    lines = []
    for label, text in rows:
        first, more = f"  {label:<{_LABEL_WIDTH}}", " " * (2 + _LABEL_WIDTH)
        lines += textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=more)
    return lines
