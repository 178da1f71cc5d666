"""The outcome of a migration, as this program's commands report it."""

from collections.abc import Mapping
from typing import Any

from sterna.cli.errors import ExitCode

FINAL = ("completed", "failed", "cancelled")
"""Statuses of query-migrate that do not change any more."""


def summarise(info: Mapping[str, Any]) -> dict[str, Any]:
    """What `--json` prints of a migration.

    :param info: as query-migrate answers, sterna's or QEMU's; what a peer does not tell is null
    """
    ram = info.get("ram", {})
    own = info.get("x-sterna", {})
    return {
        "status": info.get("status", "none"),
        "error": info.get("error-desc"),
        "verified": own.get("verified"),
        "uri": own.get("uri"),
        "peer": own.get("peer") or None,
        "total_ms": own.get("total-ms", info.get("total-time")),
        "setup_ms": info.get("setup-time"),
        "downtime_ms": own.get("downtime-ms", info.get("downtime")),
        "throttle_percent": info.get("cpu-throttle-percentage", 0),
        "downtime_parts": own.get("downtime-parts"),
        "predicted_downtime_ms": own.get("predicted-downtime-ms"),
        "predicted_downtime_parts": own.get("predicted-downtime-parts"),
        "predicted_over_real": own.get("predicted-over-real"),
        "policy": own.get("policy"),
        "verdict": own.get("verdict") or None,
        "passes": own.get("passes", []),
        "transferred_bytes": ram.get("transferred"),
        "ram_bytes": ram.get("total"),
        "zero_pages": ram.get("duplicate"),
        "normal_pages": ram.get("normal"),
        "ram_digest_source": own.get("ram-digest-source") or None,
        "ram_digest_destination": own.get("ram-digest-destination") or None,
        "in_doubt": own.get("in-doubt", False),
        "audit": own.get("audit"),
        "clock_note": own.get("clock-note"),
    }


def exit_code(summary: Mapping[str, Any], *, must_verify: bool) -> ExitCode:
    """:param must_verify: the user asked for a comparison of RAM"""
    if summary["status"] == "completed":
        return ExitCode.NOT_VERIFIED if must_verify and not summary["verified"] else ExitCode.OK
    if summary["status"] == "cancelled":
        return ExitCode.CANCELLED
    return ExitCode.MIGRATION_FAILED


def verdict(summary: Mapping[str, Any]) -> str:
    """The outcome in one line."""
    status, error = summary["status"], summary["error"]
    if status == "cancelled":
        return "cancelled: the guest runs on at the source"
    if status != "completed":
        where = "who runs the guest is in doubt" if summary["in_doubt"] else "the guest stays at the source"
        return f"{status}: {error or 'no reason given'}; {where}"
    if summary["verified"]:
        return f"completed, RAM verified: {summary['ram_digest_source']} at both ends"
    return "completed, RAM not compared"
