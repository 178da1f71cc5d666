"""The XBZRLE code: round trips, bad codes, and codes that a QEMU wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.jit.plain import plain
from tests.stream.streams import PieceSource

from sterna.memory.ram import RamBlock
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.ram.encoder import encode_pages
from sterna.stream.ram.setup import END_OF_RECORDS
from sterna.stream.reader import StreamReader
from sterna.stream.wire import StreamError
from sterna.stream.xbzrle import coding
from sterna.stream.xbzrle.coding import OVERFLOW, UNCHANGED, CodeFault

Bytes = NDArray[np.uint8]
PAGE = 4096
GUARD = 0xA5


def array(data: bytes) -> Bytes:
    return np.array(bytearray(data), dtype=np.uint8)


def encode(old: bytes, new: bytes, room: int = PAGE) -> bytes | int:
    """The code, compiled and not, which touch nothing past the room they have."""
    codes: list[bytes | int] = []
    for kernel in (coding.encode, plain(coding.encode)):
        out = np.full(room + 64, GUARD, dtype=np.uint8)
        length = int(kernel(array(old).view(np.uint64), array(new).view(np.uint64), out[:room]))
        assert (out[room:] == GUARD).all()
        codes.append(out[:length].tobytes() if length > 0 else length)
    assert codes[0] == codes[1]
    return codes[0]


def decode(code: bytes, page: bytes) -> tuple[CodeFault, int, bytes]:
    """What becomes of a page, compiled and not; memory around the page stays as it is."""
    results: list[tuple[CodeFault, int, bytes]] = []
    for check, apply in ((coding.check, coding.apply), (plain(coding.check), plain(coding.apply))):
        memory = np.full(len(page) + (2 << 14), GUARD, dtype=np.uint8)
        target = memory[1 << 14 :][: len(page)]
        target[:] = array(page)
        fault, at = check(array(code), target.size)
        if fault == CodeFault.NONE:
            apply(array(code), target)
        results.append((CodeFault(fault), int(at), target.tobytes()))
        target[:] = GUARD
        assert (memory == GUARD).all()
    assert results[0] == results[1]
    return results[0]


@st.composite
def two_pages(draw: Any, size: int = PAGE) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = (
        rng.integers(0, 256, size, dtype=np.uint8) if draw(st.booleans()) else np.zeros(size, dtype=np.uint8)
    )
    new = old.copy()
    runs = st.tuples(st.integers(0, size - 1), st.one_of(st.integers(1, 40), st.integers(1, size)))
    for at, length in draw(st.lists(runs, max_size=12)):
        new[at : at + length] = rng.integers(0, 256, new[at : at + length].size)
    if draw(st.booleans()):
        spots = rng.choice(size, draw(st.integers(0, size // 2)), replace=False)
        new[spots] ^= 0x80
    return old.tobytes(), new.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1024, 4096])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_is_encoded_is_decoded(size: int, data: st.DataObject) -> None:
    old, new = data.draw(two_pages(size))
    code = encode(old, new, size)
    if code == UNCHANGED:
        assert old == new
    elif code == OVERFLOW:
        assert encode(old, new, 3 * size) != OVERFLOW
    else:
        assert isinstance(code, bytes)
        assert len(code) <= size
        assert decode(code, old) == (CodeFault.NONE, len(code), new)
        # The bytes are the new ones, so another time does no harm.
        assert decode(code, new)[2] == new


@pytest.mark.parametrize(
    ("old", "changes", "code"),
    [
        ("00", {0: "01"}, "00 01 01"),
        ("00", {7: "ab", 8: "cd"}, "07 02 ab cd"),
        ("00", {0: "11", 2: "22"}, "00 01 11 01 01 22"),
        ("ff", {127: "01"}, "7f 01 01"),
        ("ff", {128: "01"}, "80 01 01 01"),
        ("ff", {4095: "01"}, "ff 1f 01 01"),
        ("ff", {5: "01" * 130}, "05 82 01" + "01" * 130),
        ("ff", {0: "01", 4000: "02" * 3}, "00 01 01 9f 1f 03 020202"),
    ],
)
def test_layout(old: str, changes: dict[int, str], code: str) -> None:
    before = bytes.fromhex(old) * PAGE
    after = bytearray(before)
    for at, text in changes.items():
        new = bytes.fromhex(text)
        after[at : at + len(new)] = new
    assert encode(before, bytes(after)) == bytes.fromhex(code)


@pytest.mark.parametrize("size", [8, 24, 40, 64])
def test_every_short_page_with_changes_in_any_two_places(size: int) -> None:
    old = bytes(size)
    for first in range(size):
        for second in range(size):
            new = bytearray(size)
            new[first], new[second] = 7, 9
            code = encode(old, bytes(new), 64)
            assert isinstance(code, bytes)
            assert decode(code, old)[2] == new


def test_a_code_that_does_not_fit_overflows() -> None:
    old = bytes(PAGE)
    whole = bytes([1]) * PAGE
    assert encode(old, whole) == OVERFLOW
    assert (
        encode(old, bytes(3) + whole[3:]) == bytes((3, 0x80 | (PAGE - 3) & 0x7F, PAGE - 3 >> 7)) + whole[3:]
    )
    assert encode(old, bytes(2) + whole[2:]) == OVERFLOW, "3 + 4094 bytes are one too many"
    every_other = bytes([0, 1]) * (PAGE // 2)
    assert encode(old, every_other) == OVERFLOW, "three bytes for two"
    third = bytes([0, 0, 1]) * (PAGE // 3) + bytes(1)
    assert encode(old, third) == OVERFLOW, "it would just fit, but for the two bytes that must be left over"
    assert encode(old, third, PAGE + 1) == bytes((2, 1, 1)) * (PAGE // 3)
    for room in (0, 1):
        assert encode(old, old, room) == OVERFLOW


BAD = [
    ("", CodeFault.EMPTY, 0),
    ("00", CodeFault.CUT, 1),
    ("80", CodeFault.CUT, 0),
    ("01 01", CodeFault.CUT, 1),
    ("01 02 ff", CodeFault.CUT, 1),
    ("01 80", CodeFault.CUT, 1),
    ("01 01 ff 01", CodeFault.CUT, 4),
    ("01 01 ff 81", CodeFault.CUT, 3),
    ("80 80 01 01 ff", CodeFault.LONG, 0),
    ("01 ff ff 01 ff", CodeFault.LONG, 1),
    ("00 00", CodeFault.NO_RUN, 1),
    ("01 00 ff", CodeFault.NO_RUN, 1),
    ("01 80 00 ff", CodeFault.NO_RUN, 1),
    ("00 01 ff 00 01 ff", CodeFault.NO_RUN, 3),
    ("81 20 01 ff", CodeFault.OUTSIDE, 0),
    ("80 20 01 ff", CodeFault.OUTSIDE, 2),
    ("ff 7f 01 ff", CodeFault.OUTSIDE, 0),
    ("ff 1f 02 ff ff", CodeFault.OUTSIDE, 2),
    ("00 01 ff fe 1f 02 ff ff", CodeFault.OUTSIDE, 5),
]


@pytest.mark.parametrize(("text", "fault", "at"), BAD)
def test_bad_codes_leave_the_page_alone(text: str, fault: CodeFault, at: int) -> None:
    page = bytes(range(256)) * 16
    assert decode(bytes.fromhex(text), page) == (fault, at, page)


@pytest.mark.parametrize("text", ["00 01 ff", "80 00 01 ff", "80 00 81 00 ff", "ff 1f 81 00 ff"])
def test_codes_that_qemu_takes_are_taken(text: str) -> None:
    """A first run of no bytes, and lengths longer than they need be."""
    fault, at, page = decode(bytes.fromhex(text), bytes(PAGE))
    assert (fault, at) == (CodeFault.NONE, len(bytes.fromhex(text)))
    assert page.count(0xFF) == 1


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.sampled_from([8, 64, 1024, 4096]))
def test_any_bytes_are_an_error_or_a_page(code: bytes, size: int) -> None:
    page = bytes([3]) * size
    fault, at, after = decode(code, page)
    assert 0 <= at <= len(code)
    assert (fault is CodeFault.NONE) or after == page


def test_every_flip_and_every_cut_of_a_code() -> None:
    old = bytes(PAGE)
    new = bytearray(old)
    new[5:9], new[300:450], new[4000:4003] = b"abcd", b"x" * 150, b"yes"
    code = encode(old, bytes(new))
    assert isinstance(code, bytes)
    for cut in range(len(code)):
        fault, _, page = decode(code[:cut], old)
        assert fault is not CodeFault.NONE or page != new
    for at in range(len(code)):
        for bit in range(8):
            damaged = bytearray(code)
            damaged[at] ^= 1 << bit
            fault, _, page = decode(bytes(damaged), old)
            assert page == old if fault is not CodeFault.NONE else page != new


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([8, 64, 4096]))
def test_check_is_the_same_compiled_and_not(code: bytes, size: int) -> None:
    assert coding.check(array(code), size) == plain(coding.check)(array(code), size)


# -- records ---------------------------------------------------------------------------------------------------

NAME = b"\x07toy.ram"


def record(
    offset: int, code: bytes, *, named: bool = False, encoding: int = 1, size: int | None = None
) -> bytes:
    head = (offset | 0x40 | (0 if named else 0x20)).to_bytes(8, "big") + (NAME if named else b"")
    return head + bytes((encoding,)) + (len(code) if size is None else size).to_bytes(2, "big") + code


@pytest.mark.parametrize("step", [None, 1, 7])
def test_records_change_the_pages_they_name(block: RamBlock, step: int | None) -> None:
    wire = encode_pages(block, np.arange(8)).tobytes()
    before = block.data.copy()
    block.data[4096 + 5] ^= 0xFF
    block.data[2 * 4096 - 1] = 9
    block.data[3 * 4096 + 100 : 3 * 4096 + 140] = 77
    for page, named in ((1, True), (3, False)):
        part = slice(page * 4096, (page + 1) * 4096)
        code = encode(before[part].tobytes(), block.data[part].tobytes())
        assert isinstance(code, bytes)
        wire += record(page << 12, code, named=named)
    with RamBlock("toy.ram", block.size) as target:
        decoder = RamDecoder([target])
        reader = StreamReader(PieceSource(wire + END_OF_RECORDS, step), 1 << 14)
        decoder.read_records(reader)
        np.testing.assert_array_equal(target.data, block.data)
        statistics = decoder.statistics()
        assert (statistics.records, statistics.changed) == (10, 2)
        assert statistics.bytes == len(wire) + 8


GOOD = (0x1000 | 0x08).to_bytes(8, "big") + NAME + b"\x11" * 4096


@pytest.mark.parametrize(
    ("bad", "at", "message"),
    [
        (record(0x2000, b"\0\1x"), 0, "the change of the page at 0x2000 comes before the page itself"),
        (record(0x1000, b"\0\1x", encoding=2), 8, "of the page at 0x1000 has the unknown encoding 0x02"),
        (record(0x1000, b"", size=4097), 9, "of the page at 0x1000 has 4097 bytes, more than a page"),
        (record(0x1000, b""), 11, "cannot be applied: it is empty"),
        (record(0x1000, b"\0\1xy"), 15, "cannot be applied: it is cut short"),
        (record(0x1000, b"\xff\x1f\2xy", named=True), 8 + 8 + 3 + 2, "a run ends past the page"),
        (record(0x1000, b"\0\1x\xff\xff\1x"), 14, "a run's length has more than 14 bits"),
        (record(0x1000, b"\0\0"), 12, "a run of no bytes"),
        (record(0x8000, b"\0\1x"), 0, "page offset 0x8000 is outside RAM block"),
    ],
)
@pytest.mark.parametrize("step", [None, 1])
def test_bad_records_say_where(bad: bytes, at: int, message: str, step: int | None) -> None:
    with RamBlock("toy.ram", 8 * 4096) as target:
        decoder = RamDecoder([target])
        with pytest.raises(StreamError) as caught:
            decoder.read_records(StreamReader(PieceSource(GOOD + bad + END_OF_RECORDS, step), 1 << 14))
        assert message in str(caught.value)
        assert caught.value.offset == len(GOOD) + at
        assert (target.data[4096:8192] == 0x11).all()
        assert not target.data[8192:].any()


def test_every_flip_and_every_cut_of_a_record() -> None:
    code = encode(b"\x11" * 4096, b"\x11" * 9 + b"\x22" * 3 + b"\x11" * 4000 + b"\x33" * 84)
    assert isinstance(code, bytes)
    whole = record(0x1000, code, named=True)
    variants = [whole[:cut] for cut in range(len(whole))]
    for at in range(len(whole)):
        variants += [whole[:at] + bytes((whole[at] ^ 1 << bit,)) + whole[at + 1 :] for bit in range(8)]
    with RamBlock("toy.ram", 8 * 4096) as memory:

        class Middle:
            """Pages 2 to 5 of the memory; what is around them must stay as it is."""

            name, size = "toy.ram", 4 * 4096
            data = memory.data[2 * 4096 : 6 * 4096]

        for variant in variants:
            memory.data[:] = GUARD
            decoder = RamDecoder([Middle()], fresh=False)  # type: ignore[list-item]
            try:
                decoder.read_records(StreamReader(PieceSource(GOOD + variant + END_OF_RECORDS), 1 << 14))
            except StreamError:
                pass
            assert (memory.data[: 2 * 4096] == GUARD).all()
            assert (memory.data[6 * 4096 :] == GUARD).all()


# -- codes that QEMU 7.2 wrote ------------------------------------------------------------------------------------


def golden() -> list[Any]:
    cases: list[Any] = json.loads((Path(__file__).parent / "xbzrle_qemu.json").read_text())
    return cases


def changed(page: bytes, runs: list[list[Any]]) -> bytes:
    after = bytearray(page)
    for at, text in runs:
        data = bytes.fromhex(text)
        after[at : at + len(data)] = data
    return bytes(after)


@pytest.mark.parametrize("case", golden(), ids=lambda case: case["what"])
def test_codes_are_qemus(case: Any) -> None:
    """A page (the bytes that are not zero), what was written to it, and what a QEMU made of that."""
    old = changed(bytes(PAGE), case["old"])
    new, code = changed(old, case["changes"]), bytes.fromhex(case["code"])
    assert encode(old, new) == code
    assert decode(code, old) == (CodeFault.NONE, len(code), new)
