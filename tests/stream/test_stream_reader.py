import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stream.streams import TOY, TOY_STATE, PieceSource, load, outcome, small_stream

from sterna.memory.ram import RamBlock
from sterna.stream import sections
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.stream.reader import (
    CommandPiece,
    EndOfStream,
    Event,
    SectionHeader,
    SectionPiece,
    StreamReader,
    VmDescription,
)
from sterna.stream.sections import Configuration
from sterna.stream.vmstate import StreamError
from sterna.stream.wire import TAKE_LIMIT, SectionType

HEADER = sections.header(Configuration("toy-1.0"))
RAM = SectionHeader(2, "ram", 0, 4)
DEVICE = sections.device_section(5, TOY, TOY_STATE)


@pytest.mark.parametrize("step", [None, 1, 7, 4096])
def test_pieces_come_in_order(block: RamBlock, step: int | None) -> None:
    events: list[Event] = []
    reader = StreamReader(PieceSource(small_stream(block), step), 1 << 14)
    with RamBlock(block.name, block.size) as target:
        decoder = RamDecoder([target])
        assert load(reader, decoder, events.append) == [TOY_STATE]
        np.testing.assert_array_equal(target.data, block.data)
        assert (decoder.statistics().normal, decoder.statistics().duplicate) == (6, 2)
    assert events == [
        Configuration("toy-1.0"),
        CommandPiece(1, b""),
        SectionPiece(SectionType.START, RAM),
        SectionPiece(SectionType.PART, RAM),
        CommandPiece(2, b"\0\0\0\7"),
        SectionPiece(SectionType.END, RAM),
        SectionPiece(SectionType.FULL, SectionHeader(5, "toy", 1, 3)),
        EndOfStream(),
        VmDescription(b'{"page_size": 4096, "devices": []}'),
    ]


def test_every_prefix_is_used_before_more_is_asked_for(block: RamBlock) -> None:
    """A piece is handed out as soon as its last byte is there: the peer may be waiting for the answer to it."""

    class Impatient(PieceSource):
        def readinto(self, buffer: memoryview) -> int:
            got = super().readinto(buffer)
            assert got, "asked for more than there is"
            return got

    stream = small_stream(block)
    ping = stream.index(sections.command(2, b"\0\0\0\7")) + 9
    reader = StreamReader(Impatient(stream[:ping]))
    with RamBlock(block.name, block.size) as target:
        decoder = RamDecoder([target])
        for _ in range(4):
            match reader.next():
                case SectionPiece(SectionType.START, _):
                    decoder.read_setup(reader)
                case SectionPiece(SectionType.PART, _):
                    decoder.read_records(reader)
        assert reader.next() == CommandPiece(2, b"\0\0\0\7")
        assert reader.offset == ping


def test_a_stream_may_end_without_a_description(block: RamBlock) -> None:
    with RamBlock(block.name, block.size) as target:
        stream = small_stream(block)
        assert outcome(stream[: stream.rindex(b"\x06")], RamDecoder([target])) == [TOY_STATE]


def start(name: str = "ram", number: int = 2, instance: int = 0, size: int = 8 * 4096) -> bytes:
    return sections.section_start(number, name, instance, 4) + ram_setup([("toy.ram", size)])


FOOTER = sections.footer(2)
PART = sections.section_part(2) + END_OF_RECORDS + FOOTER
END = sections.section_end(2) + END_OF_RECORDS + FOOTER


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"", "section 'header', offset 0x0: the stream is cut short"),
        (
            b"GET / HTTP/1.1\r\n",
            "section 'header', offset 0x0: this is no migration stream: it begins with 0x47",
        ),
        (HEADER[:4] + b"\0\0\0\2", "section 'header', offset 0x4: version 2 of the stream's format"),
        (HEADER[:8] + b"\1", "section 'header', offset 0x8: the configuration section is missing"),
        (
            HEADER[:9] + b"\xff" * 4,
            "section 'configuration', field 'name', offset 0xd: field 'len' counts 4294967295",
        ),
        (HEADER[:9] + b"\0\0\0\1\xff\0", "section 'configuration': the machine's name is not UTF-8"),
        (HEADER, "offset 0x3c: the stream is cut short here, after section 'configuration'"),
        (HEADER + DEVICE, "offset .*: the stream is cut short here, after section 'toy \\(instance 1\\)'"),
        (
            HEADER + DEVICE + b"\4\0",
            "offset .*: the stream is cut short here, after section 'toy \\(instance 1\\)'",
        ),
        (HEADER + b"\x42", "offset 0x3c: no part of a stream begins with the byte 0x42"),
        (HEADER + PART, "offset 0x3c: a part of section 2, which has not been started"),
        (
            HEADER + DEVICE + b"\2\0\0\0\5",
            "section 'toy \\(instance 1\\)', offset 0x87: a further part after the last",
        ),
        (HEADER + start() + FOOTER + END + PART, "section 'ram', offset 0x84: a further part after the last"),
        (
            HEADER + start() + PART,
            "section 'ram', offset 0x6d: the section's footer is missing: 0x02 in its place",
        ),
        (
            HEADER + start() + sections.footer(3),
            "section 'ram', offset 0x6d: the footer is that of section 3, not 2",
        ),
        (HEADER + start() + FOOTER + b"\0", "offset 0x72: the stream ends before the last part of: ram"),
        (
            HEADER + DEVICE + DEVICE,
            "section 'toy \\(instance 1\\)', offset .*: its number 5 is already that of",
        ),
        (HEADER + start() + FOOTER + start(number=9), "section 'ram', offset 0x72: the section comes twice"),
        (
            HEADER + sections.section_full(1, "disk", 0, 1),
            "section 'disk', offset .*: no device here has a section",
        ),
        (
            HEADER + sections.section_full(1, "toy", 0, 9),
            "section 'toy', offset .*: version 9 of 'toy' is not supp",
        ),
        (HEADER + b"\4\0\0\0\1\0" + bytes(8), "offset 0x3c: section 1 has an empty name"),
        (HEADER + b"\x08\0\2\0\5abcde", "section 'command', offset 0x3c: PING has 5 bytes of payload, not 4"),
        (
            HEADER + b"\0\x06\xff\xff\xff\xff",
            "section 'vmdesc', offset 0x3d: a description of 4294967295 bytes",
        ),
        (HEADER + b"\0\x07", "section 'vmdesc', offset 0x3d: the byte 0x07 after the end of the stream"),
        (HEADER + b"\0\x06\0\0\0\5{", "section 'vmdesc', offset 0x43: the stream is cut short"),
    ],
)
def test_errors_name_section_and_offset(stream: bytes, message: str) -> None:
    with RamBlock("toy.ram", 8 * 4096) as target:
        for step in (None, 1):
            result = outcome(stream, RamDecoder([target]), step)
            assert isinstance(result, StreamError)
            assert re.match(message, str(result)), str(result)


def test_a_failing_channel_is_a_stream_error() -> None:
    class Broken:
        def readinto(self, buffer: memoryview) -> int:
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(StreamError, match=r"offset 0x0: the channel failed: .*reset by peer") as caught:
        StreamReader(Broken()).next()
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_nothing_is_allocated_by_a_length_on_the_wire() -> None:
    reader = StreamReader(PieceSource(b"x" * 100))
    with pytest.raises(StreamError, match="the limit is"):
        reader.take(TAKE_LIMIT + 1)
    with pytest.raises(StreamError, match="offset 0x64: the stream is cut short"):
        reader.take(TAKE_LIMIT)


def test_the_number_of_sections_is_capped() -> None:
    empty = b"".join(sections.section_full(i, f"s{i}", 0, 1) + sections.footer(i) for i in range(5000))
    reader = StreamReader(PieceSource(HEADER + empty))
    for _ in range(4097):
        reader.next()
    with pytest.raises(StreamError, match=r"section 's4096', offset .*: more than 4096 sections"):
        reader.next()


def assert_contained(
    stream: bytes, block: RamBlock, change: Callable[[RamDecoder], None] = lambda _: None
) -> None:
    """Whatever the stream, it loads or fails with a `StreamError`, and memory next to the block stays as it is."""
    guarded = np.full(3 * block.size, 0xA5, dtype=np.uint8)
    inside = guarded[block.size : 2 * block.size]
    inside[:] = 0

    class Guarded:
        name, size, data = block.name, block.size, inside

    decoder = RamDecoder([Guarded()])
    result = outcome(stream, decoder)
    assert isinstance(result, StreamError | list)
    if isinstance(result, StreamError):
        assert result.offset is not None or result.section == "configuration"
    assert (guarded[: block.size] == 0xA5).all()
    assert (guarded[2 * block.size :] == 0xA5).all()


def test_every_cut_is_contained(block: RamBlock) -> None:
    stream = small_stream(block)
    description = stream.rindex(b"\x06")
    with RamBlock(block.name, block.size) as target:
        decoder = RamDecoder([target])
        ends = [*range(300), *range(300, len(stream) - 1000, 211), *range(len(stream) - 1000, len(stream))]
        for end in ends:
            result = outcome(stream[:end], decoder)
            complete = end == description
            assert isinstance(result, list) == complete, end
            if isinstance(result, StreamError):
                assert result.offset == end, str(result)


@pytest.mark.slow
def test_every_changed_byte_is_contained(block: RamBlock) -> None:
    stream = bytearray(small_stream(block))
    pages = range(400, len(stream) - 400)
    for at in range(len(stream)):
        if at in pages and at % 97:
            continue
        for change in (0x01, 0x80, 0xFF):
            stream[at] ^= change
            assert_contained(bytes(stream), block)
            stream[at] ^= change


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_several_changes_are_contained(data: st.DataObject) -> None:
    with RamBlock("toy.ram", 8 * 4096) as ram:
        ram.data[5000] = 1
        stream = bytearray(small_stream(ram))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(stream) - 1))
            kind = data.draw(st.sampled_from(["set", "insert", "delete"]))
            piece = data.draw(st.binary(min_size=1, max_size=9))
            stream[at : at + (0 if kind == "insert" else len(piece))] = b"" if kind == "delete" else piece
        assert_contained(bytes(stream), ram)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_after_the_header_is_contained(garbage: bytes) -> None:
    with RamBlock("toy.ram", 8 * 4096) as ram:
        assert_contained(HEADER + garbage, ram)
        assert_contained(HEADER + start() + FOOTER + sections.section_part(2) + garbage, ram)
