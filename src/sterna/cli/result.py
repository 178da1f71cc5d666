"""The outcome of a migration, as this program's commands report it."""

from collections.abc import Mapping
from typing import Any

from sterna.cli.errors import ExitCode


def summarise(info: Mapping[str, Any], capabilities: Mapping[str, bool] = {}) -> dict[str, Any]:
    """What `--json` prints of a migration.

    :param info: as `follow` returns, from a sterna or a QEMU; what a peer does not tell is null
    :param capabilities: in force at the source
    """
    ram = info.get("ram", {})
    own = info.get("x-sterna", {})
    # A sterna knows its peer when it has answered; a QEMU reads answers on its return path.
    asked = bool(own.get("peer")) if own else capabilities.get("return-path", False)
    return {
        "status": info.get("status", "none"),
        "source_state": info.get("run-state"),
        "destination_asked": asked,
        "error": info.get("error-desc"),
        "verified": own.get("verified"),
        "uri": info.get("uri", own.get("uri")),
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
        if must_verify and not summary["verified"]:
            return ExitCode.NOT_VERIFIED
        return ExitCode.OK if summary["destination_asked"] or _is_store(summary) else ExitCode.NOT_ASKED
    if summary["status"] == "cancelled":
        return ExitCode.CANCELLED
    return ExitCode.MIGRATION_FAILED


def _is_store(summary: Mapping[str, Any]) -> bool:
    """Whether the guest went to a file, and no destination was named. What a command does with it, nobody here knows."""
    return str(summary["uri"] or "").startswith("file:")


def outcome_line(summary: Mapping[str, Any]) -> str:
    """The outcome in one line."""
    status, error = summary["status"], summary["error"]
    if status == "cancelled":
        return f"cancelled: {_whereabouts(summary)}"
    if status != "completed":
        reason = error or "no reason given, which the source's standard error may have"
        return f"{status}: {reason}; {_whereabouts(summary)}"
    if summary["verified"]:
        return f"completed, RAM verified: {summary['ram_digest_source']} at both ends"
    if summary["destination_asked"]:
        return "completed, RAM not compared"
    if _is_store(summary):
        return f"completed: all of the guest went to {summary['uri']}"
    return "completed for the source; nobody has asked the destination whether it took the guest: look there"


def farewell(summary: Mapping[str, Any]) -> str:
    """What is left to do after a migration that completed; empty when nothing is."""
    if summary["status"] != "completed" or summary["source_state"] != "postmigrate" or _is_store(summary):
        return ""
    if not summary["destination_asked"]:
        return "keep the source until the destination runs the guest"
    return "the source has no guest any more: end it with 'quit'"


def _whereabouts(summary: Mapping[str, Any]) -> str:
    """Where the guest is after a migration that did not complete."""
    state = summary["source_state"]
    if summary["in_doubt"]:
        return "who runs the guest is in doubt"
    if state == "running":
        return "the guest runs on at the source"
    if state == "postmigrate":
        return "the source does not run the guest, and takes it for gone: look at the destination"
    return f"the guest is at the source, which does not run it: its state is {state}"
