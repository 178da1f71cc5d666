"""Values of options that several commands share."""

from sterna.cli.errors import UsageError
from sterna.monitor.units import parse_bandwidth, parse_duration_ms


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
