"""`xp`: memory as text, in QEMU's formats."""

import re
from dataclasses import dataclass

_SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}
_FORMATS = "xduoc"
_TERM = re.compile(r"\s*([+-]?)\s*(0x[0-9a-f]+|\d+)\s*", re.IGNORECASE | re.ASCII)
MAX_BYTES = 1 << 16
"""The most that one command dumps."""


@dataclass(frozen=True)
class DumpFormat:
    """What follows `xp /`.

    :ivar count: items
    :ivar size: bytes per item
    :ivar format: x, d, u, o or c
    """

    count: int = 1
    size: int = 4
    format: str = "x"

    @property
    def total_bytes(self) -> int:
        """Bytes of memory shown."""
        return self.count * self.size

    @classmethod
    def parse(cls, text: str) -> "DumpFormat":
        """
        :raise ValueError: When the text is no format, or asks for too much.
        """
        digits = len(text) - len(text.lstrip("0123456789"))
        if digits > 9:
            raise ValueError("count is too large")
        count = int(text[:digits] or "1")
        size, layout = 4, "x"
        for char in text[digits:]:
            if char in _SIZES:
                size = _SIZES[char]
            elif char in _FORMATS:
                layout = char
            else:
                raise ValueError(f"invalid char in format: {char!r}")
        if layout == "c":
            # Characters have one byte; a wider item shows as many of them.
            count, size = count * size if "b" not in text else count, 1
        if count * size > MAX_BYTES:
            raise ValueError(f"{count * size} bytes asked for, {MAX_BYTES} can be shown at once")
        return cls(count, size, layout)


def parse_expression(text: str) -> int:
    """An address: numbers, added and subtracted.

    :raise ValueError: When the text is none.
    """
    if not text:
        raise ValueError("unexpected end of expression")
    position, value = 0, 0
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None or (position and not match[1]):
            raise ValueError(f"invalid char {text[position]!r} in expression")
        number = int(match[2], 16 if match[2].lower().startswith("0x") else 10)
        value += -number if match[1] == "-" else number
        position = match.end()
    if not 0 <= value < 1 << 64:
        raise ValueError("the address is outside 64 bits")
    return value


def dump(address: int, data: bytes, layout: DumpFormat) -> str:
    """Lines of items, little-endian, each line led by its address."""
    size = layout.size
    per_line = 8 if size == 1 else 16 // size
    lines = []
    for at in range(0, len(data), per_line * size):
        row = data[at : at + per_line * size]
        items = (row[i : i + size] for i in range(0, len(row), size))
        lines.append(f"{address + at:016x}: " + " ".join(_item(item, layout.format) for item in items))
    return "".join(line + "\n" for line in lines)


def _item(item: bytes, layout: str) -> str:
    value = int.from_bytes(item, "little")
    bits = len(item) * 8
    width = (bits * 10 + 32) // 33
    if layout == "x":
        return f"0x{value:0{len(item) * 2}x}"
    if layout == "o":
        return f"0{value:0{(bits + 2) // 3}o}"
    if layout == "c":
        return _char(value)
    if layout == "d":
        value -= (value >> (bits - 1)) << bits
    return f"{value:{width}d}"


def _char(value: int) -> str:
    named = {0x27: "\\'", 0x5C: "\\\\", 0x0A: "\\n", 0x0D: "\\r"}
    if value in named:
        return f"'{named[value]}'"
    return f"'{chr(value)}'" if 32 <= value <= 126 else f"'\\x{value:02x}'"
