"""Surveys: what they find in streams made here, and what they make of broken ones."""

import dataclasses
import json
import os
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hosttree import HostTree
from tests.jit.plain import plain
from tests.stream.streams import TOY, TOY_STATE, PieceSource, small_stream

from sterna.analysis import counts, ram_survey, ramimage
from sterna.analysis.findings import StreamSurvey
from sterna.analysis.survey import DEVICE_LIMIT, survey
from sterna.host import limits
from sterna.memory.ram import RamBlock
from sterna.memory.rollingdigest import digest_ram
from sterna.stream import sections
from sterna.stream.description import VALUE_LIMIT, find_description, stream_description
from sterna.stream.ram.records import new_rows
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.stream.reader import SectionHeader
from sterna.stream.sections import Configuration
from sterna.stream.wire import Command

HEADER = sections.header(Configuration("toy-1.0"))
DESCRIPTION = stream_description([(TOY, TOY_STATE)], 4096)
END = sections.end_of_stream() + sections.vm_description(b'{"page_size": 4096, "devices": []}')


def described_stream(block: RamBlock) -> bytes:
    stream = small_stream(block)
    return stream[: stream.rindex(b"\x06")] + sections.vm_description(DESCRIPTION)


def survey_both(stream: bytes, step: int | None = None) -> StreamSurvey:
    """A survey that knows the description from the start; one that does not must come to the same."""
    known = survey(PieceSource(stream, step), description=find_description(stream), page_digests=True)
    unknown = survey(PieceSource(stream, step), page_digests=True)
    if known.fault is None or unknown.fault is None:
        assert dataclasses.replace(known, absent=()) == dataclasses.replace(unknown, absent=())
    return known


def records(pages: str, name: str = "toy.ram", fill: bytes = b"x") -> bytes:
    """Records of these pages; those after a `!` are zero."""
    out = b""
    for page in pages.split():
        number = int(page.strip("!"))
        flags = (0x02 if "!" in page else 0x08) | (0x20 if out else 0)
        out += (number << 12 | flags).to_bytes(8, "big")
        out += bytes((len(name),)) + name.encode() if not flags & 0x20 else b""
        out += b"\0" if "!" in page else fill * 4096
    return out


def ram_stream(*parts: bytes, blocks: tuple[tuple[str, int], ...] = (("toy.ram", 8 * 4096),)) -> bytes:
    out = HEADER + sections.section_start(2, "ram", 0, 4) + ram_setup(blocks) + sections.footer(2)
    for part in parts:
        out += sections.section_part(2) + part + END_OF_RECORDS + sections.footer(2)
    return out + sections.section_end(2) + END_OF_RECORDS + sections.footer(2) + END


@pytest.mark.parametrize("step", [None, 1, 4096])
def test_a_survey_has_everything(block: RamBlock, step: int | None) -> None:
    stream = described_stream(block)
    found = survey_both(stream, step)
    assert found.flaw() is None
    assert found.bytes == len(stream)
    assert found.configuration == Configuration("toy-1.0")
    ram, toy = found.sections
    assert ram.header == SectionHeader(2, "ram", 0, 4)
    assert (ram.parts, ram.offset) == (3, stream.index(b"\x01\0\0\0\2\3ram"))
    assert toy.header == SectionHeader(5, "toy", 1, 3)
    assert (toy.state, toy.bytes, toy.offset) == (
        TOY_STATE,
        len(TOY.encode(TOY_STATE)),
        stream.index(b"\4\0\0\0\5"),
    )
    [ram_block] = found.blocks
    assert (ram_block.pages, ram_block.sent, ram_block.normal, ram_block.zero) == (8, 8, 6, 2)
    assert (ram_block.repeated, ram_block.most, ram_block.first_missing) == (0, 1, None)
    assert [(one.name, one.count) for one in found.commands] == [("OPEN_RETURN_PATH", 1), ("PING", 1)]
    kinds = dataclasses.asdict(found.kinds)
    assert sum(kinds.values()) == len(stream)
    assert (kinds["page_data"], kinds["devices"], kinds["commands"]) == (6 * 4096, toy.bytes, 5 + 9)
    assert kinds["description"] == 5 + len(DESCRIPTION)
    assert kinds["zero_records"] == 9 + 9 + len(b"\7toy.ram")
    assert kinds["trailing"] == 0


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("0 1 2 3 4 5 6 7", [8]),
        ("0 1! 2 3 4 5 6 7! 1 3 5! 3 5", [8, 3, 2]),
        ("0 1 2 3 4 5 6 7 1 3 0 3", [8, 2, 2]),  # page 0 is not repeated, but comes after the step back
        ("0 1 2 3 4 5 6 7 5 6 1 2", [8, 4]),  # a pass may start in the middle of RAM
        ("0 1 2 3 4 5 6 7 7 7 7", [8, 1, 1, 1]),
        ("3 3 3", [1, 1, 1]),
        ("0 0", [1, 1]),
    ],
)
def test_passes_are_told_by_what_comes_again(order: str, expected: list[int]) -> None:
    found = survey_both(ram_stream(records(order)))
    assert [one.normal + one.zero for one in found.passes] == expected
    pages = [int(page.strip("!")) for page in order.split()]
    [block] = found.blocks
    assert block.repeated == len({page for page in pages if pages.count(page) > 1})
    assert block.most == max(pages.count(page) for page in pages)
    assert block.sent == len(set(pages))
    assert sum(one.bytes for one in found.passes) == len(records(order))
    stream = ram_stream(records(order))
    for one, first in zip(found.passes, np.cumsum([0, *expected[:-1]]), strict=True):
        word = int.from_bytes(stream[one.offset : one.offset + 8], "big")
        assert word >> 12 == pages[first]


def test_passes_over_several_blocks() -> None:
    blocks = (("low", 2 * 4096), ("high", 2 * 4096))
    first = [records("0 1", "low"), records("0 1", "high")]
    found = survey_both(
        ram_stream(*first, records("1", "low"), records("0", "high"), records("1!", "low"), blocks=blocks)
    )
    assert [one.normal + one.zero for one in found.passes] == [4, 2, 1]
    assert [(block.name, block.normal, block.zero, block.repeated) for block in found.blocks] == [
        ("low", 3, 1, 1),
        ("high", 3, 0, 1),
    ]


def change(page: int, code: bytes, name: str = "toy.ram") -> bytes:
    """An XBZRLE record."""
    head = (page << 12 | 0x40).to_bytes(8, "big") + bytes((len(name),)) + name.encode()
    return head + b"\1" + len(code).to_bytes(2, "big") + code


@pytest.mark.slow
@pytest.mark.parametrize("step", [None, 1, 7])
def test_a_change_of_a_zero_page_completes_it(step: int | None) -> None:
    """Sparse pages go as zeros and what differs; that is no new pass, unless something comes between."""
    sparse = records("1!") + change(1, b"\x05\x03abc")
    parts = [records("0 2") + change(2, b"\0\1z"), sparse + records("3 4 5 6 7")]
    found = survey_both(ram_stream(*parts), step)
    assert found.flaw() is None
    assert [(one.normal, one.zero, one.changed) for one in found.passes] == [(2, 0, 0), (5, 1, 2)]
    found = survey_both(ram_stream(sparse, sparse), step)
    assert [(one.normal, one.zero, one.changed) for one in found.passes] == [(0, 1, 1), (0, 1, 1)]
    found = survey_both(ram_stream(records("1!"), change(1, b"\0\1z")), step)
    assert [(one.normal, one.zero, one.changed) for one in found.passes] == [(0, 1, 0), (0, 0, 1)]
    assert found.blocks[0].repeated == 1


def test_changes_are_applied() -> None:
    """The digests are those of the stream that sends the same pages whole."""
    parts = [records("0 1 2 3!"), records("4 5 6 7"), change(1, b"\x05\x03abc"), change(3, b"\x00\x01z")]
    parts += [records("1!"), change(1, b"\xff\x1f\x01q")]
    found = survey_both(ram_stream(*parts))
    assert found.flaw() is None
    [block] = found.blocks
    assert (block.normal, block.zero, block.changed, block.repeated, block.most) == (7, 2, 3, 2, 4)
    assert [(one.normal, one.zero, one.changed) for one in found.passes] == [
        (7, 1, 0),
        (0, 0, 2),
        (0, 1, 0),
        (0, 0, 1),
    ]
    assert found.kinds.changes == sum(len(part) for part in (parts[2], parts[3], parts[5]))
    assert sum(dataclasses.asdict(found.kinds).values()) == found.bytes
    whole = records("0") + b"".join(
        (page << 12 | 0x28).to_bytes(8, "big") + content
        for page, content in ((1, bytes(4095) + b"q"), (3, b"z" + bytes(4095)))
    )
    other = survey_both(ram_stream(whole, records("2 4 5 6 7")))
    assert found.digest is not None
    assert other.digest is not None
    assert found.digest.hex == other.digest.hex
    assert [block.digests.tolist() for block in found.page_surveys] == [
        block.digests.tolist() for block in other.page_surveys
    ]


def test_the_digest_is_that_of_the_memory(block: RamBlock) -> None:
    found = survey_both(described_stream(block))
    assert found.digest is not None
    assert found.digest.hex == digest_ram([block]).hex
    assert survey(PieceSource(described_stream(block))).digest is None
    cut = survey(PieceSource(described_stream(block)[:-1]), page_digests=True)
    assert cut.digest is None


def test_no_more_is_held_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram_survey, "free_bytes", lambda: 5 * 4096)
    assert survey(PieceSource(ram_stream(records("0 1! 2 3! 4 5! 6 7!"))), page_digests=True).flaw() is None
    found = survey(PieceSource(ram_stream(records("0 1 2 3 4 5 6 7"))), page_digests=True)
    assert found.fault is not None
    assert "more guest RAM than can be held here for its digests: 20480 bytes are free" in found.fault.text


def test_a_device_that_is_not_as_described_is_named(block: RamBlock) -> None:
    stream = described_stream(block)
    at = stream.index(b"\x03toy") + 8
    fault = survey(
        PieceSource(stream[:at] + (9).to_bytes(4, "big") + stream[at + 4 :]),
        description=find_description(stream),
    ).fault
    assert fault is not None
    assert (fault.section, fault.offset) == ("toy (instance 1)", at + 4)
    assert "version 9" in fault.text


def test_three_quarters_of_what_the_host_can_spare_may_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HostTree(tmp_path, available=1000 << 10)
    monkeypatch.setattr(limits, "ROOT", host.root)
    assert ramimage.free_bytes() == 750 << 10
    host.write("proc/meminfo", "MemTotal:       4000 kB\n")
    assert ramimage.free_bytes() == 0


def test_the_handover_of_two_sternas_is_part_of_the_stream(block: RamBlock) -> None:
    stream = described_stream(block)
    found = survey_both(stream + sections.command(0x5302, b"{}abcd") + sections.command(0x5303))
    assert found.flaw() is None
    assert [(one.kind, one.count) for one in found.commands[2:]] == [(0x5302, 1), (0x5303, 1)]
    flaw = survey_both(stream + sections.command(0x5302, b"{}abcd")[:-1]).flaw()
    assert flaw is not None
    assert flaw.offset == len(stream) + 10


def test_the_list_of_passes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram_survey, "PASS_LIMIT", 3)
    found = survey(PieceSource(ram_stream(records("0 0 0 0 0 0"))))
    assert [one.normal for one in found.passes] == [1, 1, 4]


NAMES = st.sampled_from([None, b"toy.ram", b"toy.rom", b""])
RECORD = st.tuples(
    st.integers(0, 9), st.sampled_from([0x08, 0x02, 0x10, 0x40, 0x0A]), NAMES, st.integers(0, 300)
)
CODES = st.sampled_from([b"\x05\x03abc", b"\x00\x01z\x07\x02yz", b"", b"\x7f", b"\xff\x07\x02ab"])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(RECORD, CODES), max_size=30), st.integers(0, 2), st.booleans())
def test_the_kernel_is_the_same_compiled_and_not(
    parts: list[tuple[tuple[int, int, bytes | None, int], bytes]], cut: int, hold: bool
) -> None:
    data = b""
    for (page, flags, name, fill), code in parts:
        body = bytes(1) if flags == 0x02 and fill else b"y" * (1 if flags == 0x02 else 1024)
        if flags == 0x40:
            body = bytes((1 + (fill > 290),)) + len(code).to_bytes(2, "big") + code
        data += (page << 10 | flags | (0x20 if name is None else 0)).to_bytes(8, "big")
        data += (b"" if name is None else bytes((len(name),)) + name) + body
    staging = np.frombuffer(data[: len(data) - cut] + bytes(8), dtype=np.uint8).copy()
    results = []
    for function in (counts.count_records, plain(counts.count_records)):
        pages, block = np.zeros(8, counts.PAGE_COUNTS), np.array([(5, 0, 0, 0)], counts.BLOCK_COUNTS)
        found = counts.new_counts(10)
        found["base"] = 77
        ram, held = np.zeros(8192 if hold else 0, np.uint8), np.zeros(int(hold), np.uint64)
        name = np.frombuffer(b"toy.ram", dtype=np.uint8).copy()
        result = function(staging, 0, staging.size - 8, name, found, block, pages, ram, held, new_rows())
        results.append((tuple(map(int, result)), *(a.tolist() for a in (pages, block, found, ram, held))))
    assert results[0] == results[1]


@pytest.mark.slow
def test_every_cut_is_reported(block: RamBlock) -> None:
    stream = described_stream(block)
    description = stream.rindex(b"\x06\0")
    ends = [*range(300), *range(300, len(stream) - 1500, 97), *range(len(stream) - 1500, len(stream))]
    for end in ends:
        flaw = survey_both(stream[:end]).flaw()
        assert (flaw is None) == (end == description), end
        if flaw is not None:
            assert flaw.offset == end, flaw.text


def assert_reported_or_harmless(stream: bytes, variants: tuple[bool, ...] = (True, False)) -> StreamSurvey:
    """A stream without a fault is accounted for to the last byte.

    :param variants: whether the description is known beforehand
    """
    for known in (find_description(stream) if variant else None for variant in variants):
        found = survey(PieceSource(stream), description=known, digests=known is None)
        assert sum(dataclasses.asdict(found.kinds).values()) == found.bytes <= len(stream)
        assert sum(one.normal + one.zero + one.changed for one in found.passes) == sum(
            b.normal + b.zero + b.changed for b in found.blocks
        )
        if found.fault is None:
            assert found.bytes == len(stream)
        else:
            assert found.fault.offset is None or 0 <= found.fault.offset <= len(stream)
            assert "\n" not in found.fault.text
    return found


@pytest.mark.slow
def test_every_changed_byte_is_reported_or_harmless(block: RamBlock) -> None:
    stream = bytearray(described_stream(block))
    pages = range(400, len(stream) - 1000)
    for at in range(len(stream)):
        if at in pages and at % 97:
            continue
        for change in (0x01, 0xFE):
            stream[at] ^= change
            assert_reported_or_harmless(bytes(stream), (bool((at + change) & 1),))
            stream[at] ^= change


def test_a_changed_byte_of_the_frame_is_found_where_it_is(block: RamBlock) -> None:
    """All but the values themselves (pages, fields, names): any change there is reported, at the place."""
    stream = described_stream(block)
    footer = stream.index(sections.footer(5))
    for at in [0, 5, 8, stream.index(b"\x01\0\0\0\2"), footer, footer + 4, footer + 5]:
        changed = bytearray(stream)
        changed[at] ^= 0x50
        flaw = survey(PieceSource(bytes(changed)), description=find_description(bytes(changed))).flaw()
        assert flaw is not None, at
        assert flaw.offset is not None
        assert at - 4 <= flaw.offset <= at + 1, (at, flaw.text)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_several_changes_are_reported_or_harmless(data: st.DataObject) -> None:
    with RamBlock("toy.ram", 8 * 4096) as ram:
        ram.data[5000] = 1
        stream = bytearray(described_stream(ram))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete"]))
        piece = data.draw(st.binary(min_size=1, max_size=9))
        stream[at : at + (0 if kind == "insert" else len(piece))] = b"" if kind == "delete" else piece
    assert_reported_or_harmless(bytes(stream))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_reported_or_harmless(garbage: bytes) -> None:
    opening = (
        HEADER
        + sections.section_start(2, "ram", 0, 4)
        + ram_setup([("toy.ram", 8 * 4096)])
        + sections.footer(2)
    )
    for start in (
        b"",
        HEADER,
        opening + sections.section_part(2),
        HEADER + sections.section_full(5, "toy", 0, 3),
    ):
        assert_reported_or_harmless(start + garbage)


WHOLE = records("0 1 2 3 4 5 6 7")


def record(flags: int, body: bytes = b"") -> bytes:
    return (0 << 12 | flags).to_bytes(8, "big") + b"\7toy.ram" + body


def nameless_stream(name: bytes) -> bytes:
    """One block of one page, whose name nobody else writes, and a record that names it."""
    spelt = bytes((len(name),)) + name
    stream = ram_stream(records("0", "@"), blocks=(("@", 4096),))
    assert stream.count(b"\1@") == 2
    return stream.replace(b"\1@", spelt)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"", "section 'header', offset 0x0: the stream is cut short here"),
        (b"\x11\x22\x33\x44" + bytes(100), "this is a channel of multifd"),
        (b"#!/bin/sh\n", "this is no migration stream"),
        (
            ram_stream(record(0x40, b"\1\0\1\0")),
            "offset 0x77: the change of the page at 0x0 comes before the page",
        ),
        (ram_stream(WHOLE, record(0x40, b"\2\0\1\0")), "offset 0x80e1: .* unknown encoding 0x02"),
        (
            ram_stream(WHOLE, record(0x40, b"\1\x10\1\0")),
            "offset 0x80e2: .* has 4097 bytes, more than a page",
        ),
        (ram_stream(WHOLE, record(0x40, b"\1\0\0")), "offset 0x80e4: .* cannot be applied: it is empty"),
        (ram_stream(WHOLE, record(0x40, b"\1\0\3\0\5a")), "offset 0x80e5: .*: it is cut short"),
        (
            ram_stream(WHOLE, record(0x40, b"\1\0\4\xff\x1f\2a")),
            "offset 0x80e6: .*: a run ends past the page",
        ),
        (ram_stream(record(0x240)), "a flush of multifd"),
        (ram_stream(record(0x200)), "multifd"),
        (ram_stream(record(0x100)), "the capability compress"),
        (ram_stream(record(0x80)), "RDMA"),
        (ram_stream(record(0x800)), "no record has the flags 0x800"),
        (ram_stream(record(0x0A)), "none has the flags 0xa"),
        (ram_stream(record(0x02, b"\1")), "filled with another byte"),
        (ram_stream(records("8")), "page offset 0x8000 is outside RAM block 'toy.ram' of 0x8000 bytes"),
        (ram_stream(records("0", "toy.rom")), "RAM block 'toy.rom', which is not in the list"),
        (ram_stream(WHOLE) + b"\0" * 70_000, "70000 bytes after the end of the stream"),
        (ram_stream(WHOLE)[: -len(END)] + b"\0garbage", "7 bytes after the end of the stream"),
        (ram_stream(records("0 1 2 4 5 6 7")), "RAM block 'toy.ram': page at 0x3000 never came"),
        (nameless_stream(b""), "section 'ram', offset .*: RAM block '': a name is 1 to 255 bytes of UTF-8"),
        (
            nameless_stream(b"\xff"),
            r"section 'ram', offset .*: RAM block '\\\\xff': a name is 1 to 255 bytes",
        ),
        (
            ram_stream(record(0x02, b"\0").replace(b"\7toy.ram", b"\0")),
            "a page of RAM block '', which is not in",
        ),
        (
            ram_stream(records("0", "@").replace(b"\1@", b"\1\xff"), blocks=((r"\xff", 4096),)),
            r"a page of RAM block '\\\\xff', which is not in the list of RAM blocks",
        ),
        (HEADER + END, "no guest RAM"),
        (ram_stream(WHOLE, blocks=(("toy.ram", 1 << 60),)), "at most 67108864 can be surveyed"),
        (HEADER + sections.command(Command.PACKAGED, bytes(4)), "section 'command', .*: a packaged stream"),
        (sections.header(Configuration("x", 40)), "pages of 2\\^40 bytes"),
        (sections.header(Configuration("x", 0xFFFFFFFF)), "pages of 2\\^4294967295 bytes"),
        (sections.header(Configuration("x", capabilities=("x-ignore-shared",))), "x-ignore-shared"),
        (HEADER + sections.section_full(3, "ram", 0, 4), "must come in parts"),
        (HEADER + sections.section_start(3, "ram", 0, 5), "version 5, instance 0"),
        (ram_stream(WHOLE).replace(END, b"\0\6\0\0\0\1{"), "section 'vmdesc', offset .*: not JSON"),
        (
            ram_stream(WHOLE).replace(b'page_size": 4096', b'page_size": 1024'),
            "1024 bytes are described; .* have 4096",
        ),
        (
            ram_stream(WHOLE).replace(END, b"\0" + sections.vm_description(DESCRIPTION)),
            "section 'vmdesc', .*: described is 'toy', instance 1",
        ),
        (
            ram_stream(WHOLE).replace(END, sections.device_section(5, TOY, TOY_STATE) + END),
            "section 'toy \\(instance 1\\)', .*: the stream's description does not describe it",
        ),
        (
            ram_stream(WHOLE).replace(
                END, b"\0" + sections.vm_description(DESCRIPTION.replace(b'"toy"', b'"\\ud800"'))
            ),
            "UTF-8",
        ),
    ],
)
def test_what_is_wrong_is_named(stream: bytes, message: str) -> None:
    for known in (find_description(stream), None):
        flaw = survey(PieceSource(stream), description=known).flaw()
        assert flaw is not None
        assert re.search(message, flaw.text), flaw.text


def test_a_body_that_looks_like_a_footer_is_read_to_its_end() -> None:
    """Without a description a footer is searched for; its bytes alone do not make one."""
    fake = sections.footer(5)
    for body in (
        fake + b"abc",
        fake * 20_000 + b"z",
        b"x" + fake + b"\0z",
        fake + b"\4\0\0\0\7\3\x01\x02\x03" + bytes(8),
    ):
        device = sections.section_full(5, "odd", 0, 1) + body + sections.footer(5)
        found = survey(PieceSource(ram_stream(WHOLE).replace(END, device + b"\0"), 1000))
        assert found.fault is None
        assert found.sections[1].bytes == len(body)
        assert not found.described


def test_parts_that_only_their_owner_understands_are_passed_over() -> None:
    other = sections.section_start(7, "htab", 0, 1) + b"abc" + sections.footer(7)
    other += sections.section_end(7) + os.urandom(200_000) + sections.footer(7)
    found = survey_both(ram_stream(WHOLE).replace(END, other + END))
    assert found.flaw() is None
    assert (found.sections[1].parts, found.sections[1].bytes, found.sections[1].state) == (2, 200_003, None)


class Endless:
    """A stream that goes on as long as it is read: `head`, then `body` over and over, `total` bytes in all."""

    def __init__(self, head: bytes, body: bytes, total: int) -> None:
        self._pieces = self._repeat(head, body, total)
        self._left = b""

    @staticmethod
    def _repeat(head: bytes, body: bytes, total: int) -> Iterator[bytes]:
        yield head
        for _ in range(total // len(body)):
            yield body

    def readinto(self, buffer: memoryview) -> int:
        if not self._left:
            self._left = next(self._pieces, b"")
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def peak(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_stream() -> None:
    opening = HEADER + sections.section_start(2, "ram", 0, 4) + ram_setup([("toy.ram", 8 * 4096)])
    opening += sections.footer(2) + sections.section_part(2)
    part = records("0 1 2 3 4 5 6 7") + records("0! 1! 2! 3! 4! 5! 6! 7!")
    assert peak(lambda: survey(Endless(opening, part, 64 << 20), page_digests=True)) < 4 << 20


def test_devices_are_kept_up_to_a_limit() -> None:
    opening = HEADER + sections.section_full(5, "toy", 0, 3)
    found: list[StreamSurvey] = []
    used = peak(lambda: found.append(survey(Endless(opening, b"x" * 65536, 4 * DEVICE_LIMIT))))
    assert found[0].fault is not None
    assert "more than 33554432 bytes of device sections" in found[0].fault.text
    assert used < 3 * DEVICE_LIMIT


def of_structures(count: int) -> bytes:
    """A stream with a device that is so many structures of one byte each, and says so."""
    inner = {"vmsd_name": "s", "version": 1, "fields": [{"name": "b", "type": "uint8", "size": 1}]}
    field = {"name": "x", "array_len": count, "type": "struct", "size": 1, "struct": inner}
    device = {"name": "toy", "instance_id": 0, "vmsd_name": "toy", "version": 3, "fields": [field]}
    text = json.dumps({"page_size": 4096, "devices": [device]}).encode()
    section = sections.section_full(5, "toy", 0, 3) + bytes(count) + sections.footer(5)
    return ram_stream(WHOLE).replace(END, section + sections.end_of_stream() + sections.vm_description(text))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "known"), [(VALUE_LIMIT // 2 - 1, False), (VALUE_LIMIT, False), (VALUE_LIMIT, True)]
)
def test_devices_are_taken_apart_up_to_a_limit(count: int, known: bool) -> None:
    stream = of_structures(count)
    text = find_description(stream)
    assert text is not None
    found: list[StreamSurvey] = []
    used = peak(lambda: found.append(survey(PieceSource(stream), description=text if known else None)))
    [one] = found
    if count < VALUE_LIMIT // 2:
        assert one.fault is None
        assert one.sections[1].state is not None
    else:
        assert one.fault is not None
        assert one.fault.unsupported
        assert (
            f"section 'vmdesc', offset {len(stream) - len(text):#x}: its devices have more" in one.fault.text
        )
    assert used < 128 << 20
