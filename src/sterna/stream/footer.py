"""Reading a section whose layout is not known (yet): it ends at its footer, which is searched for.

A section does not say how long it is. A footer is five bytes that a body can have as well, so what follows it is
looked at, too: it must be able to begin the next part of the stream. Of a live stream no more is waited for than
is needed to tell.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sterna.stream.reader import StreamReader
from sterna.stream.wire import VMDESC_LIMIT, Command, SectionType

FOOTER_BYTES = 5
_PRIVATE_COMMANDS = 0x100
"""Commands from here on are nobody's but the two ends' own."""


@dataclass(frozen=True)
class Following:
    """What can come after the section that is being read.

    :ivar known: numbers of the sections that have come
    :ivar unfinished: numbers of those of which a part is still to come
    """

    known: Collection[int]
    unfinished: Collection[int]

    def fits(self, data: bytes) -> bool | None:
        """Whether a part of a stream can begin like this; None when it takes more bytes to tell."""
        if not data:
            return None
        match data[0]:
            case SectionType.PART | SectionType.END:
                return self._fits_part(data)
            case SectionType.START | SectionType.FULL:
                return self._fits_opening(data)
            case SectionType.COMMAND:
                return _fits_command(data)
            case SectionType.EOF:
                return _fits_end(data)
        return False

    def _fits_part(self, data: bytes) -> bool | None:
        return None if len(data) < 5 else int.from_bytes(data[1:5], "big") in self.unfinished

    def _fits_opening(self, data: bytes) -> bool | None:
        if len(data) >= 5 and int.from_bytes(data[1:5], "big") in self.known:
            return False
        if len(data) < 6:
            return None
        size = data[5]
        name = data[6 : 6 + size]
        if not size or not name.decode("latin-1").isprintable():
            return False
        return True if len(name) == size else None


def _fits_command(data: bytes) -> bool | None:
    if len(data) < 3:
        return None
    kind = int.from_bytes(data[1:3], "big")
    return 0 < kind <= max(Command) or kind >= _PRIVATE_COMMANDS


def _fits_end(data: bytes) -> bool | None:
    """The end, and a description."""
    if len(data) < 7:
        # However few there are, they must not contradict it.
        return False if data[1:2] not in (b"", bytes((SectionType.VMDESCRIPTION,))) else None
    size = int.from_bytes(data[2:6], "big")
    return data[1] == SectionType.VMDESCRIPTION and size <= VMDESC_LIMIT and data[6:7] == b"{"


def until_footer(reader: StreamReader, section_id: int) -> Iterator[bytes]:
    """The bytes of a body up to its footer, in pieces.

    :raise StreamError: When the stream ends before a footer.
    """
    mark = bytes((SectionType.FOOTER,)) + section_id.to_bytes(4, "big")
    following = Following(reader.known_sections, reader.unfinished_sections)
    while True:
        at, end = reader.window
        data = reader.staging[at:end].tobytes()
        found, fits = _find_footer(data, mark, following)
        if found >= 0 and fits:
            yield reader.take(found)
            return
        certain = found if found >= 0 else max(0, len(data) - FOOTER_BYTES + 1)
        if certain:
            yield reader.take(certain)
        left = len(data) - certain
        if len(reader.peek(left + 1)) == left:
            if found >= 0:
                return  # the stream ends within what follows the footer
            raise reader.cut("the stream is cut short here: the section's footer never came")


def _find_footer(data: bytes, mark: bytes, following: Following) -> tuple[int, bool]:
    """Where the first footer is, or may be, -1 if nowhere; and whether that is certain."""
    at = data.find(mark)
    while at >= 0:
        fits = following.fits(data[at + len(mark) :][:_LOOKAHEAD])
        if fits is not False:
            return at, bool(fits)
        at = data.find(mark, at + 1)
    return -1, False


_LOOKAHEAD = 1 + 4 + 1 + 255
"""Most bytes that it takes to tell: those of the longest opening."""
