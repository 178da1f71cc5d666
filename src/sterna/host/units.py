"""Numbers with units, as people write them: ``1Gbit``, ``128MiB``, ``300ms``."""

import re

_SIZE_UNITS = {
    "": 1, "b": 1,
    "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_BIT_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}
_SECOND_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)", re.IGNORECASE | re.ASCII)


def _split(text: str, what: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= 40 else None
    if match is None:
        raise ValueError(f"{text[:40]!r} is not {what}")
    return float(match[1]), match[2].lower()


def parse_size(text: str, default_unit: str = "") -> int:
    """Bytes from ``128``, ``128M`` (MiB, as QEMU reads it), ``128MiB`` or ``128MB`` (10^6).

    :param default_unit: what a number without a unit counts
    :raise ValueError: When the text is no size, or not below 2^63 bytes; one line that says what was expected.
    """
    number, unit = _split(text, "a size, such as 512M or 2G")
    scale = _SIZE_UNITS.get(unit or default_unit)
    if scale is None:
        raise ValueError(f"{text[:40]!r} is not a size: no unit {unit!r}; expected K, M, G or T")
    return _whole(text, number * scale)


def parse_bandwidth(text: str) -> int:
    """Bytes per second from ``1Gbit`` (10^9 bits/s), ``128MiB`` or a number of bytes, ``/s`` allowed; 0 or
    ``unlimited`` is no limit.

    :raise ValueError: When the text is no bandwidth.
    """
    if text.strip().lower() == "unlimited":
        return 0
    bare = re.sub(r"/s$", "", text.strip(), flags=re.IGNORECASE)
    number, unit = _split(bare, "a bandwidth, such as 1Gbit or 128MiB")
    if unit in _BIT_UNITS:
        size = _whole(text, number * _BIT_UNITS[unit] / 8)
    elif unit in _SIZE_UNITS:
        size = _whole(text, number * _SIZE_UNITS[unit])
    else:
        raise ValueError(
            f"{text[:40]!r} is not a bandwidth: no unit {unit!r}; expected Mbit, Gbit, MB, MiB, GiB"
        )
    if number and not size:
        raise ValueError(f"{text[:40]!r} is less than a byte per second")
    return size


def parse_duration_ms(text: str) -> int:
    """Milliseconds from ``300`` (ms), ``300ms``, ``1.5s`` or ``2min``.

    :raise ValueError: When the text is no time.
    """
    number, unit = _split(text, "a time, such as 300ms or 2s")
    if (unit or "ms") not in _SECOND_UNITS:
        raise ValueError(f"{text[:40]!r} is not a time: no unit {unit!r}; expected ms, s or min")
    return _whole(text, number * _SECOND_UNITS[unit or "ms"] * 1000)


def format_size(size: float) -> str:
    """``1.75 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def format_rate(bytes_per_second: float) -> str:
    """``118.2 MB/s``."""
    for unit in ("B/s", "kB/s", "MB/s"):
        if bytes_per_second < 1000:
            return f"{bytes_per_second:.1f} {unit}"
        bytes_per_second /= 1000
    return f"{bytes_per_second:.2f} GB/s"


def counted(number: int, noun: str) -> str:
    """``1 page``, ``2 pages``, ``3 passes``."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def _whole(text: str, value: float) -> int:
    if value >= 1 << 63:
        raise ValueError(f"{text[:40]!r} is too large")
    return round(value)
