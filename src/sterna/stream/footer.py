"""Finding the end of a section whose fields are not known: its footer, and what may come after one."""

from collections.abc import Iterator

from sterna.stream.reader import StreamReader
from sterna.stream.wire import Command, SectionType

_CHUNK = 64 << 10
FOOTER_BYTES = 5
_LOOKAHEAD = FOOTER_BYTES + 1 + 4 + 1 + 255 + 8
"""Bytes of a footer and of the longest opening after it."""


def until_footer(reader: StreamReader, section_id: int) -> Iterator[bytes]:
    """The bytes up to a section's footer, in pieces. A footer is its five bytes and what may follow them.

    :raise StreamError: When there is none.
    """
    mark = bytes((SectionType.FOOTER,)) + section_id.to_bytes(4, "big")
    while True:
        data = reader.peek(_CHUNK)
        final = len(data) < _CHUNK
        certain = len(data) if final else len(data) - _LOOKAHEAD
        at = data.find(mark)
        while 0 <= at < certain and not _may_follow(data[at + len(mark) :][:_LOOKAHEAD]):
            at = data.find(mark, at + 1)
        if 0 <= at < certain:
            yield reader.take(at)
            return
        yield reader.take(certain)
        if final:
            raise reader.error("the stream is cut short here: the section's footer never came")


def _may_follow(data: bytes) -> bool:
    """Whether a part of a stream can begin like this."""
    match data[:1]:
        case b"" | b"\x02" | b"\x03":
            return True
        case b"\x00":
            return data[1:2] in (b"", bytes((SectionType.VMDESCRIPTION,)))
        case b"\x08":
            kind = int.from_bytes(data[1:3], "big")
            return len(data) < 3 or 0 < kind <= max(Command) or kind >= 1 << 15
        case b"\x01" | b"\x04":
            size = data[5] if len(data) > 5 else 1
            return size > 0 and data[6 : 6 + size].decode("latin-1").isprintable()
    return False
