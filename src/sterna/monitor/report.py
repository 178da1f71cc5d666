"""What `info migrate` and `info migrate_parameters` show, line by line as QEMU does."""

from collections.abc import Mapping
from typing import Any

from sterna.host.printable import printable

_UNITS = {
    "announce-initial": " ms",
    "announce-max": " ms",
    "announce-step": " ms",
    "downtime-limit": " ms",
    "max-bandwidth": " bytes/second",
    "x-checkpoint-delay": " ms",
    "x-sterna-deadline": " s",
    "x-sterna-doubt-timeout": " ms",
    "x-sterna-switchover-timeout": " ms",
    "xbzrle-cache-size": " bytes",
}


def parameter_lines(parameters: Mapping[str, Any]) -> str:
    """:param parameters: as query-migrate-parameters answers"""
    return "".join(f"{name}: {_value(value)}{_UNITS.get(name, '')}\n" for name, value in parameters.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "''" if value == "" else str(value)


def migration_report(info: Mapping[str, Any]) -> str:
    """:param info: as query-migrate answers"""
    lines = []
    if "status" in info:
        reason = f" ({info['error-desc']})" if "error-desc" in info else ""
        lines.append(f"Migration status: {info['status']}{reason}")
    for name, label in (
        ("total-time", "total time"),
        ("expected-downtime", "expected downtime"),
        ("downtime", "downtime"),
        ("setup-time", "setup"),
    ):
        if name in info:
            lines.append(f"{label}: {info[name]} ms")
    if "ram" in info:
        lines += _ram_lines(info["ram"])
    if "xbzrle-cache" in info:
        lines += _xbzrle_lines(info["xbzrle-cache"])
    if info.get("cpu-throttle-percentage"):
        lines.append(f"cpu throttle percentage: {info['cpu-throttle-percentage']}")
    for address in info.get("socket-address", ()):
        shown = address["path"] if address["type"] == "unix" else f"{address['host']}:{address['port']}"
        lines.append(f"socket address: {address['type']}:{shown}")
    extras = info.get("x-sterna", {})
    if extras.get("policy"):
        lines.append(f"policy: {extras['policy']}")
    if "predicted-downtime-ms" in extras and "downtime" in info:
        lines.append(f"predicted downtime: {round(extras['predicted-downtime-ms'])} ms")
    if extras.get("verdict"):
        lines.append(f"verdict: {extras['verdict']}")
    if "verified" in extras:
        lines.append(f"verified: {'yes' if extras['verified'] else 'no'}")
    if "audit" in extras:
        lines += _audit_lines(extras["audit"])
    if extras.get("ram-digest-source"):
        lines.append(f"ram digest source: {extras['ram-digest-source']}")
    if extras.get("ram-digest-destination"):
        lines.append(f"ram digest destination: {extras['ram-digest-destination']}")
    for left in extras.get("left-behind", ()):
        instance = f" {left['instance-id']}" if left["instance-id"] else ""
        lines.append(
            f"left behind: {left['name']}{instance} ({left['nbytes']} bytes, {left['digest']}): {left['reason']}"
        )
    # A peer has named sections and said digests.
    return "".join(printable(line) + "\n" for line in lines)


def _ram_lines(ram: Mapping[str, Any]) -> list[str]:
    lines = [
        f"transferred ram: {ram['transferred'] >> 10} kbytes",
        f"throughput: {ram['mbps']:.2f} mbps",
        f"remaining ram: {ram['remaining'] >> 10} kbytes",
        f"total ram: {ram['total'] >> 10} kbytes",
        f"duplicate: {ram['duplicate']} pages",
        f"skipped: {ram['skipped']} pages",
        f"normal: {ram['normal']} pages",
        f"normal bytes: {ram['normal-bytes'] >> 10} kbytes",
        f"dirty sync count: {ram['dirty-sync-count']}",
        f"page size: {ram['page-size'] >> 10} kbytes",
        f"multifd bytes: {ram['multifd-bytes'] >> 10} kbytes",
        f"pages-per-second: {ram['pages-per-second']}",
    ]
    if ram["dirty-pages-rate"]:
        lines.append(f"dirty pages rate: {ram['dirty-pages-rate']} pages")
    if ram["precopy-bytes"]:
        lines.append(f"precopy ram: {ram['precopy-bytes'] >> 10} kbytes")
    if ram["downtime-bytes"]:
        lines.append(f"downtime ram: {ram['downtime-bytes'] >> 10} kbytes")
    return lines


def _audit_lines(audit: Mapping[str, Any]) -> list[str]:
    return [
        f"audit: {audit['harvests']} harvests, {audit['pages-judged']} pages compared, {audit['lost-pages']} lost",
        f"audit held the guest: {audit['held-ms']:.1f} ms, at most {audit['longest-hold-ms']:.1f} ms at once",
    ]


def _xbzrle_lines(cache: Mapping[str, Any]) -> list[str]:
    return [
        f"cache size: {cache['cache-size']} bytes",
        f"xbzrle transferred: {cache['bytes'] >> 10} kbytes",
        f"xbzrle pages: {cache['pages']} pages",
        f"xbzrle cache miss: {cache['cache-miss']} pages",
        f"xbzrle cache miss rate: {cache['cache-miss-rate']:.2f}",
        f"xbzrle encoding rate: {cache['encoding-rate']:.2f}",
        f"xbzrle overflow: {cache['overflow']}",
    ]
