"""Values of options that several commands share."""

from typing import Any

from sterna.cli.errors import UsageError
from sterna.host.units import parse_bandwidth, parse_duration_ms


def bandwidth_value(text: str) -> int:
    """`--bandwidth` in bytes per second; 0 is unlimited.

    :raise UsageError: When it is none.
    """
    try:
        return parse_bandwidth(text)
    except ValueError as error:
        raise UsageError(f"--bandwidth: {error}") from error


def duration_value(text: str) -> int:
    """`--downtime-limit` in milliseconds.

    :raise UsageError: When it is none, or longer than a migration accepts.
    """
    from sterna.migration.parameters import MAX_DOWNTIME_LIMIT_MS

    try:
        value = parse_duration_ms(text)
    except ValueError as error:
        raise UsageError(f"--downtime-limit: {error}") from error
    if value > MAX_DOWNTIME_LIMIT_MS:
        raise UsageError(
            f"--downtime-limit: {text!r} is too long; it is at most {MAX_DOWNTIME_LIMIT_MS // 1000} s"
        )
    return value


def policy_values(text: str) -> dict[str, Any]:
    """`--policy` as migration parameters.

    :raise UsageError: When it is none.
    """
    from sterna.migration.parameters import PARAMETERS, POLICIES

    name, colon, argument = text.partition(":")
    policy = POLICIES.get(name) if name in POLICIES else None
    if policy is None or bool(policy.argument) != bool(colon):
        known = [
            one + (f":{kind.unit.upper()}" if (kind := POLICIES.get(one)).argument else "")
            for one in POLICIES
        ]
        raise UsageError(f"--policy: {text[:80]!r} is not {', '.join(known[:-1])} or {known[-1]}")
    if not policy.argument:
        return {"x-sterna-policy": name}
    limits = PARAMETERS[policy.argument]
    value = int(argument) if argument.isascii() and argument.isdigit() and len(argument) < 10 else 0
    if not limits.low <= value <= limits.high:
        raise UsageError(
            f"--policy: {argument[:40]!r} is not a {name} in {policy.unit}, {limits.low} to {limits.high}"
        )
    return {"x-sterna-policy": name, policy.argument: value}
