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

    :raise UsageError: When it is none.
    """
    try:
        return parse_duration_ms(text)
    except ValueError as error:
        raise UsageError(f"--downtime-limit: {error}") from error
