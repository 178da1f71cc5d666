"""Surveys of multifd: main streams with their channels, whole and broken."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis.test_survey import END, HEADER, ram_stream, records
from tests.jit.plain import plain
from tests.stream.streams import PieceSource

from sterna.analysis import counts
from sterna.analysis.capture import survey_file
from sterna.analysis.channel_survey import ChannelInput, StoredChannels
from sterna.analysis.findings import StreamSurvey
from sterna.analysis.survey import survey
from sterna.stream.multifd.compression import compressor
from sterna.stream.multifd.format import Compression, Init, Packet, PacketFormat

FORMAT = PacketFormat(12)
SYNC = FORMAT.encode(Packet(sync=True))


def page(fill: int) -> bytes:
    return bytes((fill,)) * 4096


class Sender:
    """One channel's bytes."""

    def __init__(self, number: int, compression: Compression = Compression.NONE) -> None:
        self.data = Init(bytes(16), number).encode()
        self._compression = compression
        self._compressor = None if compression is Compression.NONE else compressor(compression, 1)

    def pages(self, fills: dict[int, int], name: str = "toy.ram", sync: bool = False) -> "Sender":
        raw = b"".join(page(fill) for fill in fills.values())
        data = self._compressor(raw) if self._compressor else raw
        numbers = np.array(list(fills), dtype=np.int64)
        self.data += FORMAT.encode(Packet(sync, self._compression, name, numbers, len(data))) + data
        return self

    def sync(self) -> "Sender":
        self.data += SYNC
        return self


def survey_all(
    main: bytes, *channels: Sender | bytes, step: int | None = None, digests: bool = True
) -> StreamSurvey:
    given = [c.data if isinstance(c, Sender) else c for c in channels]
    sources = [ChannelInput(f"channel {i}", PieceSource(data, step)) for i, data in enumerate(given)]
    return survey(PieceSource(main, step), digests=digests, channels=StoredChannels(sources))


def whole(compression: Compression = Compression.NONE) -> tuple[bytes, list[Sender]]:
    """Eight pages in three passes over two channels: set-up, three parts and the last one."""
    one, two = Sender(0, compression), Sender(1, compression)
    for channel in (one, two):
        channel.sync()
    one.pages({0: 1, 1: 1}).pages({4: 1}).sync()
    two.pages({2: 1, 3: 1}, sync=True)
    one.sync()
    two.pages({1: 2, 0: 2}).sync()
    one.sync()
    two.pages({0: 3}, sync=True)
    for channel in (one, two):
        channel.sync()
    return ram_stream(records("5! 6! 7!"), records("2!"), b""), [one, two]


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("step", [None, 1000])
def test_pages_of_all_channels_are_found(compression: Compression, step: int | None) -> None:
    main, channels = whole(compression)
    found = survey_all(main, *channels, step=step)
    assert found.flaw() is None
    [block] = found.blocks
    assert (block.normal, block.zero, block.sent, block.repeated, block.most) == (8, 4, 8, 3, 3)
    assert [one.normal + one.zero for one in found.passes] == [8, 3, 1]
    assert [(one.id, one.packets, one.pages) for one in found.channels] == [(0, 7, 3), (1, 6, 5)]
    assert all(one.compression == compression.value for one in found.channels)
    assert [one.bytes for one in found.channels] == [len(channel.data) for channel in channels]
    kinds = dataclasses.asdict(found.kinds)
    assert sum(kinds.values()) == found.total_bytes == len(main) + sum(len(one.data) for one in channels)
    assert kinds["page_data"] == 0
    if compression is Compression.NONE:
        assert kinds["channel_pages"] == 8 * 4096
    else:
        assert 0 < kinds["channel_pages"] < 4096
    plain = ram_stream(
        records("0", fill=b"\3"), records("1", fill=b"\2"), records("3 4", fill=b"\1"), records("2! 5! 6! 7!")
    )
    other = survey(PieceSource(plain), digests=True)
    assert found.digest is not None
    assert other.digest is not None
    assert found.digest.hex == other.digest.hex
    assert survey_all(main, *channels, digests=False).digest is None


def test_a_capture_is_read_as_a_whole(tmp_path: Path) -> None:
    main, channels = whole()
    (tmp_path / "main.stream").write_bytes(main)
    for i, channel in enumerate(channels):
        (tmp_path / f"channel-{i}.stream").write_bytes(channel.data)
    found = survey_file(tmp_path, digests=True)
    assert found.flaw() is None
    again = survey_file(
        tmp_path / "main.stream", [tmp_path / f"channel-{i}.stream" for i in (1, 0)], digests=True
    )
    assert found.total_bytes == again.total_bytes == len(main) + sum(len(one.data) for one in channels)
    assert (found.blocks, found.passes, found.channels) == (again.blocks, again.passes, again.channels)


def test_a_page_that_comes_on_a_channel_and_beside_it_makes_one_pass_more() -> None:
    one = Sender(0).sync().pages({2: 1}, sync=True).sync()
    found = survey_all(ram_stream(records("0 1 2! 3 4 5 6 7")), one)
    assert found.flaw() is None
    assert [(one.normal, one.zero) for one in found.passes] == [(3, 0), (5, 1)]
    [block] = found.blocks
    assert (block.sent, block.repeated, block.most) == (8, 1, 2)


def broken(at: int, *channels: Sender | bytes) -> list[Sender | bytes]:
    _, good = whole()
    result: list[Sender | bytes] = list(good)
    result[at : at + 1] = channels
    return result


HEAD_BYTES = FORMAT.header_bytes
BOMB = compressor(Compression.ZLIB, 9)(bytes(1 << 20))


def zlib_packet(data: bytes) -> bytes:
    return FORMAT.encode(Packet(False, Compression.ZLIB, "toy.ram", np.arange(1), len(data))) + data


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (broken(1), r"RAM block 'toy.ram': page at 0x2000 never came|page at"),
        (broken(0), "section 'multifd': channel 0 is missing; there is one with the number 1"),
        (broken(1, b""), "section 'channel 1', offset 0x0: the stream is cut short"),
        (broken(1, b"QEVM" + bytes(60)), "section 'channel 1', offset 0x0: no multifd packet"),
        (broken(1, Sender(0)), "'channel 1', offset 0x0: there is a channel with the number 0 already"),
        (broken(1, Sender(1)), "section 'channel 1', offset 0x40: the stream is cut short"),
        (
            broken(1, Sender(1).sync().pages({8: 1})),
            f"offset {64 + HEAD_BYTES:#x}: page offset 0x8000 is outside",
        ),
        (
            broken(1, Sender(1).sync().pages({0: 1}, "toy.rom")),
            "RAM block 'toy.rom', which is not in the list",
        ),
        (broken(1, Sender(1).sync().data + b"junk" * 400), "no multifd packet: it begins with 0x6a756e6b"),
        (broken(1, whole()[1][1].data[:-HEAD_BYTES]), "offset .*: the stream is cut short"),
        (broken(1, whole()[1][1].data + SYNC), "a multifd packet after the end of guest RAM"),
        (
            broken(
                1, Sender(1).sync().pages({2: 1}).data + Sender(1, Compression.ZLIB).pages({3: 1}).data[64:]
            ),
            "the compression changes to zlib",
        ),
        (
            broken(1, Sender(1).sync().data + zlib_packet(b"x" * 9)),
            f"offset {64 + HEAD_BYTES:#x}: damaged zlib data",
        ),
        (broken(1, Sender(1).sync().data + zlib_packet(BOMB)), "hold more than the 4096 bytes"),
    ],
)
def test_what_is_wrong_with_a_channel_is_named(channels: Sequence[Sender | bytes], message: str) -> None:
    main = whole()[0]
    found = survey_all(main, *channels)
    flaw = found.flaw()
    assert flaw is not None
    assert re.search(message, flaw.text), flaw.text
    assert (found.complete, found.main_fault, found.bytes) == (True, None, len(main)), "it is read to its end"
    assert found.digest is None or found.fault is None


def test_nobody_waits_to_be_read_beside_a_channel_that_is_broken() -> None:
    main, good = whole()
    closed: list[int] = []

    class Closing(StoredChannels):
        def close(self) -> None:
            closed.append(source.left)

    source = PieceSource(main, 64)
    given = [ChannelInput("one", PieceSource(good[0].data)), ChannelInput("two", PieceSource(b""))]
    found = survey(source, channels=Closing(given))
    assert found.fault is not None
    assert found.fault.section == "two"
    [left] = closed
    assert left > 0, "the main stream goes on"
    assert found.bytes == len(main)


def test_channels_left_out_are_asked_for() -> None:
    flaw = survey(PieceSource(whole()[0])).flaw()
    assert flaw is not None
    assert "page at 0x0 never came; with multifd it came on a channel" in flaw.text


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(Compression),
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 3000),
)
def test_damage_is_reported_or_harmless(
    compression: Compression, victim: int, damage: list[tuple[int, int]], cut: int
) -> None:
    main, channels = whole(compression)
    streams = [bytearray(main), *(bytearray(channel.data) for channel in channels)]
    for at, value in damage:
        streams[victim][at % len(streams[victim])] = value
    del streams[victim][len(streams[victim]) - cut % 2 * cut :]
    found = survey_all(bytes(streams[0]), *(bytes(stream) for stream in streams[1:]))
    assert sum(dataclasses.asdict(found.kinds).values()) == found.total_bytes
    if found.fault is None:
        assert found.total_bytes == sum(len(stream) for stream in streams)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True), max_size=6), st.booleans())
def test_the_kernel_is_the_same_compiled_and_not(packets: list[list[int]], hold: bool) -> None:
    results = []
    for function in (counts.count_pages, plain(counts.count_pages)):
        counted, found = np.zeros(8, counts.PAGE_COUNTS), counts.new_counts(10)
        held = np.zeros(int(hold), np.uint64)
        after = []
        for i, pages in enumerate(packets):
            after.append(int(function(np.array(pages), 0, found, counted, held)))
            counts.next_sweep(i, found)
        results.append((after, *(a.tolist() for a in (counted, found, held))))
    assert results[0] == results[1]


def test_a_main_stream_alone_needs_no_channel() -> None:
    main = HEADER + END
    assert survey(PieceSource(main), channels=StoredChannels([])).fault is None
    assert survey(PieceSource(main), channels=StoredChannels([])).flaw() is not None
    assert survey_all(ram_stream(records("0 1 2 3 4 5 6 7"))).flaw() is None


def test_channels_that_were_not_read_are_named() -> None:
    found = survey_all(HEADER + END, *whole()[1])
    assert found.fault is not None
    assert found.fault.text == "section 'channel 0': nothing of it was read: the main stream has no guest RAM"
    assert (found.complete, found.main_fault) == (True, None)
