"""Bodies of an unknown layout: where they end, and how little of a live stream is waited for to tell."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.stream.streams import PieceSource

from sterna.stream import sections
from sterna.stream.footer import until_footer
from sterna.stream.reader import EndOfStream, SectionPiece, StreamReader
from sterna.stream.wire import SectionType, StreamError

HEADER = sections.header(sections.Configuration("toy-1.0"))
NUMBER = 5
FOOTER = sections.footer(NUMBER)
OPENING = sections.section_full(NUMBER, "toy", 0, 1)
END = sections.end_of_stream()
DESCRIPTION = sections.vm_description(b'{"page_size": 4096, "devices": []}')
NEXT = sections.section_full(6, "next", 2, 1) + b"body" + sections.footer(6)
RAM = sections.section_start(2, "ram", 0, 4)


class Live:
    """A channel that would wait for ever once its bytes are used up."""

    def __init__(self, data: bytes, step: int) -> None:
        self._source = PieceSource(data, step)

    def readinto(self, buffer: memoryview) -> int:
        assert self._source.left, "more is waited for than there will be"
        return self._source.readinto(buffer)


def opened(source: object, unfinished: bool = False) -> StreamReader:
    """A reader in front of the body."""
    reader = StreamReader(source, 1 << 14)  # type: ignore[arg-type]
    reader.next()
    if unfinished:
        assert isinstance(reader.next(), SectionPiece)
    assert isinstance(reader.next(), SectionPiece)
    return reader


def body_of(reader: StreamReader) -> bytes:
    return b"".join(until_footer(reader, NUMBER))


@settings(deadline=None, max_examples=80)
@given(st.binary(max_size=300), st.integers(1, 40_000), st.integers(0, 40_000))
def test_a_body_ends_where_its_footer_is(body: bytes, step: int, padding: int) -> None:
    body = body + b"\x7e" * (padding % 7) + bytes(padding) + body
    assume(FOOTER not in body)
    for rest in (NEXT, END + DESCRIPTION):
        # Six bytes of what follows a last section tell it, and so does the opening of another.
        reader = opened(Live(HEADER + OPENING + body + FOOTER + rest[:13], step))
        assert body_of(reader) == body
    reader = opened(PieceSource(HEADER + OPENING + body + FOOTER + END, step))
    assert body_of(reader) == body
    assert isinstance(reader.next(), EndOfStream)


@pytest.mark.parametrize(
    "fake",
    [
        FOOTER,
        FOOTER + b"\x09",
        FOOTER + b"\x04" + NUMBER.to_bytes(4, "big") + b"\x03abc",
        FOOTER + b"\x04\0\0\0\x09\0",
        FOOTER + b"\x04\0\0\0\x09\x03a\x01c",
        FOOTER + b"\x02\0\0\0\x05",
        FOOTER + b"\x00\x05",
        FOOTER + b"\x00\x06\x7f\xff\xff\xff{",
        FOOTER + b"\x00\x06\0\0\0\x09[",
        FOOTER + b"\x08\0\0",
        sections.footer(6) + NEXT,
        FOOTER[:-1],
    ],
)
def test_bytes_like_a_footer_in_the_body(fake: bytes) -> None:
    body = b"abc" + fake + b"xyz" + fake
    for step in (1, 3, 100_000):
        reader = opened(PieceSource(HEADER + OPENING + body + FOOTER + NEXT + END + DESCRIPTION, step))
        assert body_of(reader) == body


def test_a_part_follows_only_where_one_is_missing() -> None:
    part = sections.section_part(2)
    stream = RAM + sections.footer(2) + OPENING + b"abc" + FOOTER + part + b"def" + FOOTER + END + DESCRIPTION
    assert body_of(opened(PieceSource(HEADER + stream), unfinished=True)) == b"abc"
    stream = OPENING + b"abc" + FOOTER + part + b"def" + FOOTER + END + DESCRIPTION
    assert body_of(opened(PieceSource(HEADER + stream))) == b"abc" + FOOTER + part + b"def"


def test_a_stream_that_ends_within_the_body() -> None:
    data = HEADER + OPENING + bytes(50_000)
    with pytest.raises(StreamError, match=f"'toy', offset {len(data):#x}: .*the section's footer never came"):
        body_of(opened(PieceSource(data, 1000)))
    # What may be cut short is not held against the footer.
    for rest in (b"", b"\0", b"\0\x06", b"\x04\0\0", b"\x08", b"\x02\0"):
        assert body_of(opened(PieceSource(HEADER + OPENING + b"abc" + FOOTER + rest))) == b"abc"


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_bytes_end_or_are_refused(data: bytes, step: int) -> None:
    reader = opened(PieceSource(HEADER + OPENING + data, step))
    wrong = None
    try:
        body = body_of(reader)
    except StreamError as error:
        wrong = error
    if wrong is None:
        assert data.startswith(body + FOOTER)
        assert data[len(body) + 5 :][:1] in {b"", *(bytes((kind,)) for kind in SectionType)}
    else:
        assert (wrong.section, wrong.offset) == ("toy", len(HEADER + OPENING + data))
        assert "never came" in wrong.message
