"""Mutations that know what the bytes of a stream look like."""

import random
import re

from tests.fuzz.parts import Parts

_MARKS = re.compile(
    rb"\x7e\x00\x00.."  # a footer
    rb"|[\x01\x04]\x00\x00..[\x02-\x18][a-z_/]{2,24}"  # an opening
    rb"|[\x02\x03]\x00\x00..(?=\x00)"  # a further part
    rb"|\x08[\x00\x53].\x00"  # a command
    rb"|\x00\x06\x00"  # the end, a description
    rb"|[\x04-\x20](?:double\.ram|mach-virt\.ram)"  # a RAM record with its block's name
    rb"|\x00\x00\x00\x00\x00.[\x00-\xf0][\x08\x28\x40\x60\x10\x02\x22]"  # a RAM record
    rb"|\x01\x0f?[\x00-\x0f].[\x00-\x7f]"  # XBZRLE: encoding, length, first run
    rb"|\x11\x22\x33\x44"  # multifd
    rb'|"[a-z_-]{2,20}"\s*:|[\[\]{}]|\d+',  # JSON
    re.DOTALL,
)
_RECORD = re.compile(rb"\x00\x00\x00\x00.{3}[\x08\x28\x40\x60\x02\x22]", re.DOTALL)
_MARK_LIMIT = 4000
_POWERS = (0, 1, 2, 3, 7, 8, 12, 15, 16, 20, 26, 31, 32, 40, 63, 64)
_INTERESTING = sorted({max(0, (1 << power) + more) for power in _POWERS for more in (-1, 0, 1)})
_NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"4095",
    b"65536",
    b"67108865",
    b"4294967296",
    b"18446744073709551616",
    b"1e400",
    b"NaN",
    b"1.5",
)
_TEXTS = (
    b'""',
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'"\\ud800"',
    b'"\\u0000"',
    b"\xff",
    b"[" * 300,
    b'{"a":' * 300,
)


class Mutator:
    """:param seeds: inputs of the same kind, to take pieces from"""

    def __init__(self, rng: random.Random, seeds: list[Parts]) -> None:
        self._rng = rng
        self._seeds = seeds

    def mutate(self, parts: Parts) -> Parts:
        """A few changes, seldom many."""
        rng = self._rng
        parts = list(parts)
        for _ in range(1 + min(int(rng.expovariate(0.7)), 12)):
            if len(parts) > 1 and rng.random() < 0.04:
                self._shuffle(parts)
                continue
            which = rng.randrange(len(parts))
            parts[which] = bytes(self._change(bytearray(parts[which])))
        return parts

    def _shuffle(self, parts: Parts) -> None:
        rng = self._rng
        one, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        kind = rng.randrange(3)
        if kind == 0:
            parts[one], parts[other] = parts[other], parts[one]
        elif kind == 1:
            parts[one] = parts[other]
        else:
            del parts[one]

    def _place(self, data: bytearray) -> int:
        """Somewhere near a mark, or anywhere."""
        rng = self._rng
        if rng.random() < 0.25:
            return rng.randint(0, len(data))
        # A window of the whole, so that long inputs cost no more than short ones.
        start = rng.choice((0, max(0, len(data) - 40_000), rng.randint(0, len(data))))
        marks = []
        for match in _MARKS.finditer(data, start, start + 40_000):
            marks += [match.start(), match.end()]
            if len(marks) > _MARK_LIMIT:
                break
        if not marks:
            return rng.randint(0, len(data))
        return min(len(data), max(0, rng.choice(marks) + rng.choice((0, 0, 0, -1, 1, 2, 4, 5, 8))))

    def _change(self, data: bytearray) -> bytearray:
        rng = self._rng
        if not data:
            return bytearray(rng.randbytes(rng.randint(1, 40)))
        at = self._place(data)
        size = rng.choice((1, 2, 4, 8))
        match rng.randrange(13):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 1] = rng.randbytes(1)
            case 2:
                value = rng.choice(_INTERESTING) & ((1 << 8 * size) - 1)
                data[at : at + size] = value.to_bytes(size, "big")
            case 3:
                value = int.from_bytes(data[at : at + size], "big") + rng.choice((-1, 1, 8, -8, 4096, -4096))
                data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "big")
            case 4:
                del data[at : at + rng.choice((1, 2, 4, 8, rng.randint(1, 300)))]
            case 5:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 8, rng.randint(1, 100))))
            case 6:
                end = self._place(data)
                piece = data[min(at, end) : max(at, end)][:70_000]
                target = self._place(data)
                data[target:target] = piece
            case 7:
                end = self._place(data)
                low, high = min(at, end), max(at, end)
                if high - low < 70_000 or rng.random() < 0.1:
                    del data[low:high]
            case 8 if rng.random() < 0.5:
                del data[at:]
            case 9:
                other = bytearray(rng.choice(rng.choice(self._seeds)))
                there = self._place(other)
                length = rng.choice((8, 64, 5000, 70_000))
                data[at : at + rng.choice((0, length))] = other[there : there + length]
            case 10:
                self._change_text(data, at)
            case 11:
                self._move_page(data, at)
            case _:
                data[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        return data

    def _move_page(self, data: bytearray, at: int) -> None:
        """The next RAM record is of another page, perhaps the one after the block's last."""
        match = _RECORD.search(data, at)
        if match is not None:
            flags = int.from_bytes(match[0], "big") & 0xFFF
            page = self._rng.choice(
                (*range(9), 1 << 12, (1 << 12) - 1, (1 << 52) - 1, self._rng.getrandbits(14))
            )
            data[match.start() : match.end()] = (page << 12 | flags).to_bytes(8, "big")

    def _change_text(self, data: bytearray, at: int) -> None:
        rng = self._rng
        match = re.compile(rb'\d+|"[^"\n]{0,60}"|[\w./:-]+').search(data, at)
        if match is None:
            return
        start, end = match.span()
        if data[start : start + 1].isdigit():
            data[start:end] = rng.choice((*_NUMBERS, rng.choice(_TEXTS)))
        elif rng.random() < 0.5:
            data[start:end] = rng.choice(_TEXTS)
        else:
            other = bytes(rng.choice(rng.choice(self._seeds)))
            found = re.findall(rb'"[^"\n]{0,60}"', other[:20_000])
            data[start:end] = rng.choice(found) if found else data[start:end] * 2
