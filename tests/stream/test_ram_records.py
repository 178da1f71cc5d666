import re
import struct as packing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.jit.plain import plain
from tests.stream import reference
from tests.stream.streams import PieceSource

from sterna.memory.bitmap import new_bitmap, page_numbers
from sterna.memory.digest import PIECE_SIZE
from sterna.memory.ram import RamBlock
from sterna.memory.rollingdigest import RollingDigest, digest_ram
from sterna.stream.ram import records
from sterna.stream.ram.decoder import RamDecoder, RamStatistics
from sterna.stream.ram.encoder import encode_pages
from sterna.stream.ram.records import Status
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup, read_setup
from sterna.stream.reader import StreamReader
from sterna.stream.vmstate import StreamError

NAME = b"\x07toy.ram"


def word(offset: int, flags: int) -> bytes:
    return packing.pack(">Q", offset | flags)


def read(decoder: RamDecoder, body: bytes, step: int | None = None) -> StreamReader:
    reader = StreamReader(PieceSource(body, step), 1 << 14)
    decoder.read_records(reader)
    return reader


def test_records_are_laid_out_as_qemus(block: RamBlock) -> None:
    pages = encode_pages(block, np.array([1, 2, 3, 0, 4]), prefix=b"ab", suffix=b"yz")
    data = [block.data[i * 4096 : (i + 1) * 4096].tobytes() for i in range(8)]
    expected = b"ab" + word(0x1000, 0x08) + NAME + data[1]
    expected += word(0x2000, 0x22) + b"\0" + word(0x3000, 0x28) + data[3]
    expected += word(0x0000, 0x28) + data[0] + word(0x4000, 0x22) + b"\0" + b"yz"
    assert pages.tobytes() == expected
    assert (pages.nbytes, pages.normal, pages.duplicate) == (len(expected), 3, 2)
    assert pages.iov.dtype == np.uint64
    assert pages.iov.shape == (7, 2)
    assert [int(a) - block.hva for a in pages.iov[1::2, 0]] == [0x1000, 0x3000, 0]
    assert pages.iov[1::2, 1].tolist() == [4096] * 3


def test_page_data_is_read_when_it_is_sent(block: RamBlock) -> None:
    pages = encode_pages(block, np.array([0]))
    block.data[:4096] = 0x55
    assert pages.tobytes()[-4096:] == b"\x55" * 4096


def test_no_pages_are_prefix_and_suffix(block: RamBlock) -> None:
    nothing = np.zeros(0, dtype=np.int64)
    assert encode_pages(block, nothing, prefix=b"ab", suffix=b"c").tobytes() == b"abc"
    assert encode_pages(block, nothing).tobytes() == b""
    assert encode_pages(block, nothing).iov.shape == (0, 2)


@pytest.mark.parametrize("at", [0, 1, 7, 8, 63, 64, 2047, 4088, 4095])
def test_a_page_with_any_byte_set_is_not_zero(block: RamBlock, at: int) -> None:
    block.data[:] = 0
    block.data[4096 + at] = 1
    pages = encode_pages(block, np.array([0, 1, 2]))
    assert (pages.normal, pages.duplicate) == (1, 2)


def test_pages_outside_the_block_are_not_encoded(block: RamBlock) -> None:
    for number in (-1, 8, 2**40):
        with pytest.raises(ValueError, match="has 8 pages"):
            encode_pages(block, np.array([0, number]))


@pytest.mark.parametrize("page_bits", [10, 11, 12])
@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 15), max_size=24),
    filled=st.sets(st.integers(0, 63)),
    step=st.one_of(st.none(), st.integers(1, 5000)),
)
def test_what_is_encoded_is_decoded(
    page_bits: int, numbers: list[int], filled: set[int], step: int | None
) -> None:
    with RamBlock("toy.ram", 16 * 4096) as source, RamBlock("toy.ram", 16 * 4096) as target:
        for quarter in filled:
            source.data[quarter * 1024 + 1000] = quarter + 1
        target.data[:] = 0xEE
        pages = encode_pages(
            source, np.array(numbers, dtype=np.int64), suffix=END_OF_RECORDS, page_bits=page_bits
        )
        decoder = RamDecoder([target], page_bits, fresh=False)
        reader = read(decoder, pages.tobytes(), step)
        assert reader.offset == pages.nbytes
        for number in range(16):
            part = slice(number * 4096, (number + 1) * 4096)
            expected = source.data[part] if number in numbers else np.full(4096, 0xEE)
            np.testing.assert_array_equal(target.data[part], expected)
        records = len(numbers) * 4096 >> page_bits
        assert decoder.statistics() == RamStatistics(records, pages.normal, pages.duplicate, pages.nbytes)
        per_page = 4096 >> page_bits
        bits = np.unpackbits(decoder.received["toy.ram"].view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits) // per_page) == set(numbers)
        assert bits.sum() == len(set(numbers)) * per_page


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 7), max_size=9),
    st.binary(max_size=9),
    st.binary(max_size=9),
    st.sampled_from([10, 12]),
)
def test_encoder_and_reference_agree(
    numbers: list[int], prefix: bytes, suffix: bytes, page_bits: int
) -> None:
    words = np.zeros(8 * 512, dtype=np.uint64)
    words[[0, 511, 1024, 2047]] = 1
    results: list[Any] = []
    for kernel in (records.encode_records, plain(records.encode_records), reference.encode_records):
        headers = np.zeros(len(prefix) + len(numbers) * 9 + len(NAME) + len(suffix), dtype=np.uint8)
        headers[: len(prefix)] = bytearray(prefix)
        iov = np.zeros((2 * len(numbers) + 2, 2), dtype=np.uint64)
        result = kernel(
            np.array([(page_bits, len(prefix), 1 << 32, 1 << 40)], dtype=records.PLAN),
            words,
            np.array(numbers, dtype=np.int64),
            np.array(bytearray(NAME)),
            np.array(bytearray(suffix), dtype=np.uint8),
            headers,
            iov,
        )
        results.append((*(int(number) for number in result), iov.tolist(), headers.tolist()))
    assert results[0] == results[1] == results[2]


@st.composite
def bodies(draw: Any) -> bytes:
    """Records, mostly good ones."""
    out = b""
    for _ in range(draw(st.integers(0, 6))):
        flags = draw(st.sampled_from([0x08, 0x28, 0x28, 0x02, 0x22, 0x22, 0x10, 0x40, 0x0A, 0x3FF]))
        offset = draw(st.sampled_from([0, 1, 2, 3, 4, 2**51, 2**52 - 1])) << 12
        out += word(offset, flags)
        if not flags & 0x20:
            out += draw(st.sampled_from([NAME, NAME, b"\x05other", b"\0"]))
        out += b"\x33" * 4096 if flags & 0x08 else draw(st.sampled_from([b"\0", b"\0", b"\1"]))
    return out[: draw(st.integers(max(0, len(out) - 5000), len(out)))]


def decode(
    kernel: Any,
    staging: Any,
    at: int,
    end: int,
    name: Any,
    ram: Any,
    page_bits: int,
    received: Any,
    written: Any,
    fresh: bool,
    counts: Any,
) -> tuple[int, int]:
    """As the decoder has records applied; `counts` are of whole pages, zero pages and changes."""
    stream = records.new_received(page_bits, fresh)
    found = kernel(staging, at, end, name, stream, ram, received, written, records.new_rows())
    counts += stream[0].tolist()[2:]
    return found


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(bodies(), st.booleans(), st.booleans())
def test_decoder_and_reference_agree(body: bytes, named: bool, fresh: bool) -> None:
    staging = np.array(bytearray(body), dtype=np.uint8)
    name = np.array(bytearray(b"toy.ram" if named else b""), dtype=np.uint8)
    results: list[Any] = []
    for kernel in (records.apply_records, plain(records.apply_records), reference.apply_records):
        ram = np.zeros(4 * 4096, dtype=np.uint8)
        ram[4096] = 9
        before = ram.copy()
        written = np.zeros(1, dtype=np.uint8)
        received = np.zeros(1, dtype=np.uint64)
        counts = np.zeros(3, dtype=np.int64)
        at, status = decode(kernel, staging, 0, staging.size, name, ram, 12, received, written, fresh, counts)
        assert written[0] or np.array_equal(ram, before)
        found = int(at), int(status), ram.tobytes(), received.tolist(), written.tolist(), counts.tolist()
        results.append(found)
    assert results[0] == results[1] == results[2]
    assert results[0][1] in list(Status)


def test_zero_records_leave_untouched_pages_alone() -> None:
    """A page that is zero from the start is neither written nor read: reading memory maps it, too."""
    with RamBlock("toy.ram", 64 << 20) as source, RamBlock("toy.ram", 64 << 20) as target:
        everything = np.arange(source.pages)
        wire = encode_pages(source, everything, suffix=END_OF_RECORDS).tobytes()
        before = resident_bytes()
        read(RamDecoder([target]), wire)
        assert resident_bytes() - before < 8 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_zero_records_clear_what_came_before(block: RamBlock) -> None:
    with RamBlock("toy.ram", block.size) as target:
        decoder = RamDecoder([target])
        read(decoder, encode_pages(block, np.arange(8), suffix=END_OF_RECORDS).tobytes())
        block.data[:] = 0
        read(decoder, encode_pages(block, np.arange(8), suffix=END_OF_RECORDS).tobytes())
        assert not target.data.any()
    with RamBlock("toy.ram", block.size) as target:
        target.data[:] = 7
        read(
            RamDecoder([target], fresh=False),
            encode_pages(block, np.arange(8), suffix=END_OF_RECORDS).tobytes(),
        )
        assert not target.data.any()


BOTH_DECODERS = pytest.mark.parametrize(
    "kernel",
    [records.apply_records, plain(records.apply_records)],
    ids=["kernel", "plain"],
)
PIECES = 3
CHANGE = b"\x05\x01\xaa"
"""XBZRLE: byte 5 becomes 0xaa."""


@BOTH_DECODERS
@pytest.mark.parametrize("page_bits", [10, 12])
@pytest.mark.parametrize(
    "place", [0, 1, PIECE_SIZE - 1, PIECE_SIZE, 2 * PIECE_SIZE - 1, PIECES * PIECE_SIZE - 1]
)
@pytest.mark.parametrize(
    ("had", "came", "fresh", "record", "has", "marked"),
    [
        (b"\0", False, True, "page", b"\x33", True),
        (b"\7", True, True, "page", b"\x33", True),
        (b"\7", True, True, "zero", b"\0", True),
        (b"\7", True, False, "zero", b"\0", True),
        (b"\7", False, False, "zero", b"\0", True),
        (b"\0", True, True, "zero", b"\0", False),
        (b"\0", False, False, "zero", b"\0", False),
        (b"\0", False, True, "zero", b"\0", False),
        (b"\7", True, True, "change", b"\7\7\7\7\7\xaa", True),
    ],
)
def test_a_record_marks_the_piece_that_it_writes_and_no_other(
    kernel: Any,
    page_bits: int,
    place: int,
    had: bytes,
    came: bool,
    fresh: bool,
    record: str,
    has: bytes,
    marked: bool,
) -> None:
    """A digest that was made of the piece before is renewed for it; no mark of an earlier record hides that one is missing."""
    page_bytes = 1 << page_bits
    page = place >> page_bits
    here = slice(page * page_bytes, (page + 1) * page_bytes)
    ram = np.full(PIECES * PIECE_SIZE, 0xEE, dtype=np.uint8)
    ram[here] = had[0]
    expected = ram.copy()
    expected[here] = np.frombuffer(has.ljust(page_bytes, has if len(has) == 1 else had), dtype=np.uint8)
    received = new_bitmap(ram.size >> page_bits)
    if came:
        received[page >> 6] |= np.uint64(1 << (page & 63))
    flags, data = {
        "page": (0x28, b"\x33" * page_bytes),
        "zero": (0x22, b"\0"),
        "change": (0x60, b"\1" + len(CHANGE).to_bytes(2, "big") + CHANGE),
    }[record]
    body = np.frombuffer(word(here.start, flags) + data + END_OF_RECORDS, dtype=np.uint8).copy()
    written = np.zeros(PIECES, dtype=np.uint8)
    counts = np.zeros(3, dtype=np.int64)
    name = np.frombuffer(b"toy.ram", dtype=np.uint8).copy()
    at, status = decode(kernel, body, 0, body.size, name, ram, page_bits, received, written, fresh, counts)
    assert (int(at), int(status)) == (body.size, Status.END)
    np.testing.assert_array_equal(ram, expected)
    assert written.tolist() == [int(marked and piece == place // PIECE_SIZE) for piece in range(PIECES)]
    assert page_numbers(received).tolist() == [page]
    assert counts.tolist() == [int(record == kind) for kind in ("page", "zero", "change")]


@BOTH_DECODERS
@pytest.mark.parametrize("at", [0, 1, 7, 8, 2047, 4088, 4095])
def test_a_zero_record_clears_and_marks_a_page_with_any_byte_set(kernel: Any, at: int) -> None:
    ram = np.zeros(3 * 4096, dtype=np.uint8)
    ram[4096 + at] = 1
    ram[[4095, 2 * 4096]] = 0xEE
    body = np.frombuffer(word(0x1000, 0x22) + b"\0" + END_OF_RECORDS, dtype=np.uint8).copy()
    written = np.zeros(1, dtype=np.uint8)
    name = np.frombuffer(b"toy.ram", dtype=np.uint8).copy()
    decode(
        kernel, body, 0, body.size, name, ram, 12, new_bitmap(3), written, False, np.zeros(3, dtype=np.int64)
    )
    assert not ram[4096:8192].any()
    assert written.tolist() == [1]
    assert (ram[4095], ram[2 * 4096]) == (0xEE, 0xEE)


@pytest.mark.parametrize("record", ["page", "zero", "change"])
def test_a_digest_that_is_kept_up_is_that_of_what_the_records_leave(record: str) -> None:
    """As at a destination: the digest's marks are those that the decoder sets, and all were renewed before the record."""
    page = PIECE_SIZE // 4096 + 3
    with (
        RamBlock("toy.ram", PIECES * PIECE_SIZE) as source,
        RamBlock("toy.ram", PIECES * PIECE_SIZE) as target,
    ):
        source.data[:] = 7
        decoder = RamDecoder([target])
        with RollingDigest([target]) as rolling:
            decoder.written["toy.ram"] = rolling.marks("toy.ram")
            rolling.start()
            read(decoder, encode_pages(source, np.arange(source.pages), suffix=END_OF_RECORDS).tobytes())
            rolling.catch_up(30)
            assert rolling.stale_pieces == 0
            here = slice(page * 4096, (page + 1) * 4096)
            if record == "change":
                source.data[here.start + 5] = 0xAA
                body = (
                    word(here.start, 0x60) + b"\1" + len(CHANGE).to_bytes(2, "big") + CHANGE + END_OF_RECORDS
                )
            else:
                source.data[here] = 0x33 if record == "page" else 0
                body = encode_pages(source, np.array([page]), suffix=END_OF_RECORDS).tobytes()
            read(decoder, body)
            assert rolling.finish().hex == digest_ram([source]).hex
        np.testing.assert_array_equal(target.data, source.data)


def test_records_switch_between_blocks(block: RamBlock) -> None:
    with (
        RamBlock("other", 4096) as other,
        RamBlock("toy.ram", block.size) as one,
        RamBlock("other", 4096) as two,
    ):
        other.data[:] = 5
        body = encode_pages(block, np.array([0])).tobytes() + encode_pages(other, np.array([0])).tobytes()
        body += encode_pages(block, np.array([7, 6])).tobytes() + END_OF_RECORDS
        read(RamDecoder([one, two]), body, step=11)
        np.testing.assert_array_equal(two.data, other.data)
        np.testing.assert_array_equal(one.data[6 * 4096 :], block.data[6 * 4096 :])
        np.testing.assert_array_equal(one.data[:4096], block.data[:4096])
        assert not one.data[4096 : 6 * 4096].any()


def test_a_block_continues_in_the_next_part(block: RamBlock) -> None:
    with RamBlock("toy.ram", block.size) as target:
        decoder = RamDecoder([target])
        read(decoder, word(0, 0x02) + NAME + b"\0" + END_OF_RECORDS)
        read(decoder, word(0x1000, 0x28) + b"\x44" * 4096 + END_OF_RECORDS)
        assert (target.data[4096:8192] == 0x44).all()


GOOD = word(0, 0x08) + NAME + bytes(4096)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            word(0x8000, 0x28) + bytes(4096),
            "page offset 0x8000 is outside RAM block 'toy.ram' of 0x8000 bytes",
        ),
        (word(2**63, 0x28) + bytes(4096), "page offset 0x8000000000000000 is outside"),
        (word(2**64 - 4096, 0x22) + b"\0", "page offset 0xfffffffffffff000 is outside"),
        (word(0x1800, 0x28) + bytes(4096), "a record with unknown flags 0x828"),
        (word(0x1000, 0x401), "a record with unknown flags 0x401"),
        (word(0x1000, 0x0), r"a record with flags 0x0 \(none\), which are not supported"),
        (
            word(0x1000, 0x68) + b"\1\0\1x",
            r"a record with flags 0x68 \(PAGE\|CONTINUE\|XBZRLE\), which are not supp",
        ),
        (word(0x1000, 0x200), r"a record with flags 0x200 \(MULTIFD_FLUSH\), which are not supported"),
        (word(0x1000, 0x10), r"a record with flags 0x10 \(EOS\), which are not supported"),
        (word(0x1000, 0x0A), r"a record with flags 0xa \(ZERO\|PAGE\), which are not supported"),
        (word(0x1000, 0x22) + b"\1", "a record of a zero page is filled with another byte than zero"),
        (
            word(0x1000, 0x02) + b"\4disk\0",
            "a page of RAM block 'disk', which is not in the list of RAM blocks",
        ),
        (word(0x1000, 0x02) + b"\0\0", "a page of RAM block '', which is not in the list of RAM blocks"),
        (
            word(0x1000, 0x02) + b"\1\xff\0",
            r"a page of RAM block '\\\\xff', which is not in the list of RAM blocks",
        ),
    ],
)
def test_bad_records_are_refused_before_anything_is_written(record: bytes, message: str) -> None:
    with RamBlock("toy.ram", 8 * 4096) as target:
        for step in (None, 1):
            decoder = RamDecoder([target])
            with pytest.raises(StreamError, match=f"^offset {len(GOOD):#x}: {message}"):
                read(decoder, GOOD + record + END_OF_RECORDS, step)
            assert decoder.statistics().records == 1
            assert not target.data.any()


def test_a_block_is_not_found_by_another_spelling_of_its_name() -> None:
    """The kernel, which compares bytes, would ask for it for ever."""
    with RamBlock(r"\xff", 4096) as target, pytest.raises(StreamError, match="not in the list of RAM blocks"):
        read(RamDecoder([target]), word(0, 0x02) + b"\1\xff\0" + END_OF_RECORDS)


def test_a_first_record_must_name_its_block() -> None:
    with RamBlock("toy.ram", 4096) as target, pytest.raises(StreamError, match="none has been named yet"):
        read(RamDecoder([target]), word(0, 0x22) + b"\0")


def test_setup_layout() -> None:
    assert ram_setup([("a", 0x2000), ("bc", 0x1000)]) == (
        word(0x3000, 0x04) + b"\1a" + word(0x2000, 0) + b"\2bc" + word(0x1000, 0) + word(0, 0x10)
    )
    for name in ("", "x" * 256):
        with pytest.raises(StreamError, match="a name has 1 to 255 bytes"):
            ram_setup([(name, 0x1000)])


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=60), st.integers(1, 2**30).map(lambda n: n << 12), max_size=6
    )
)
def test_setup_comes_back(blocks: dict[str, int]) -> None:
    reader = StreamReader(PieceSource(ram_setup(list(blocks.items()))))
    assert dict(read_setup(reader)) == blocks


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ram_setup([("a", 0x4000)]), "Size mismatch: a: 0x4000 != 0x2000"),
        (
            ram_setup([("a", 0x2000), ("c", 0x1000)]),
            r'Unknown ramblock "c", cannot accept migration \(0x1000 bytes\)',
        ),
        (ram_setup([("a", 0x2000)]), "RAM block 'b' does not exist at the source"),
        (ram_setup([("a", 0x2000), ("a", 0x2000)]), "RAM block 'a' is listed twice"),
        (
            word(0x3000, 0x04) + b"\1a" + word(2**63, 0),
            "RAM block 'a' has 0x8000000000000000 bytes of the 0x3000",
        ),
        (word(0x3000, 0x04) + b"\1a" + word(0x1001, 0), "RAM block 'a' has 0x1001 bytes"),
        (word(0x3000, 0x04) + b"\1a" + word(0, 0), "RAM block 'a' has 0x0 bytes"),
        (word(0x2000, 0x04) + b"\1a" + word(0x2000, 0) + word(0, 8), "does not end where its sizes add up"),
        (word(0x1000, 0x04) + b"\0" + word(0x1000, 0), "RAM block '': a name is 1 to 255 bytes of UTF-8"),
        (word(0x1000, 0x04) + b"\1\xff" + word(0x1000, 0), r"RAM block '\\\\xff': a name is 1 to 255 bytes"),
        (word(0x2000, 0x08), "a list of RAM blocks belongs here, not a record with flags 0x8"),
        (ram_setup([(f"{i}", 0x1000) for i in range(1025)]), "more than 1024 RAM blocks"),
    ],
)
def test_other_blocks_than_the_destinations_are_refused(body: bytes, message: str) -> None:
    with RamBlock("a", 0x2000) as a, RamBlock("b", 0x1000) as b:
        RamDecoder([a, b]).read_setup(StreamReader(PieceSource(ram_setup([("b", 0x1000), ("a", 0x2000)]))))
        with pytest.raises(StreamError) as caught:
            RamDecoder([a, b]).read_setup(StreamReader(PieceSource(body)))
        assert re.search(message, str(caught.value)), str(caught.value)
