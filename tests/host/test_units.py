"""Numbers with units."""

from collections.abc import Callable

import pytest

from sterna.host.units import format_rate, format_size, parse_bandwidth, parse_duration_ms, parse_size


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parse_bandwidth, "1Gbit", 125_000_000),
        (parse_bandwidth, "1.5Gbit/s", 187_500_000),
        (parse_bandwidth, "100Mbps", None),
        (parse_bandwidth, "100 Mbit/s", 12_500_000),
        (parse_bandwidth, "128MiB", 128 << 20),
        (parse_bandwidth, "128MiB/s", 128 << 20),
        (parse_bandwidth, "128M", 128 << 20),
        (parse_bandwidth, "5MB", 5_000_000),
        (parse_bandwidth, "1000", 1000),
        (parse_bandwidth, "0", 0),
        (parse_bandwidth, "unlimited", 0),
        (parse_bandwidth, "1bit", None),
        (parse_bandwidth, "fast", None),
        (parse_bandwidth, "-1Gbit", None),
        (parse_bandwidth, "1e9", None),
        (parse_bandwidth, "99999999999999Tbit", None),
        (parse_bandwidth, "9" * 400, None),
        (parse_duration_ms, "300ms", 300),
        (parse_duration_ms, "300", 300),
        (parse_duration_ms, "1.5s", 1500),
        (parse_duration_ms, "2min", 120_000),
        (parse_duration_ms, "soon", None),
        (parse_duration_ms, "3kg", None),
        (parse_duration_ms, "", None),
        (parse_size, "1G", 1 << 30),
        (parse_size, "1.5GiB", 3 << 29),
        (parse_size, "2GB", 2_000_000_000),
        (parse_size, "7", 7),
        (parse_size, "1Gbit", None),
        (parse_size, "١", None),
    ],
)
def test_parsing(parse: Callable[[str], int], text: str, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"."):
            parse(text)
    else:
        assert parse(text) == expected


def test_formatting() -> None:
    assert format_size(0) == "0 B"
    assert format_size(1792 << 20) == "1.75 GiB"
    assert format_size(5 << 40) == "5120.00 GiB"
    assert format_rate(125_000_000) == "125.0 MB/s"
    assert format_rate(1.22e9) == "1.22 GB/s"
