"""Streams to read in tests, and sources to read them from."""

from collections.abc import Callable

import numpy as np

from sterna.memory.ram import RamBlock
from sterna.stream import sections
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.ram.encoder import encode_pages
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.stream.reader import (
    CommandPiece,
    EndOfStream,
    Event,
    SectionPiece,
    StreamReader,
    VmDescription,
)
from sterna.stream.vmstate import (
    DeviceState,
    StreamError,
    VmStateDescription,
    array,
    boolean,
    counted_array,
    struct,
    u8,
    u32,
    u64,
)
from sterna.stream.wire import Command, SectionType

LINE = VmStateDescription("line", 1, (u8("level"), boolean("edge")))
EXTRA = VmStateDescription("toy/extra", 1, (u64("clock"),))
TOY = VmStateDescription(
    "toy",
    3,
    (
        u32("control"),
        array(struct("lines", LINE), 3),
        u32("count"),
        counted_array(u64("queue"), counted_by="count", limit=8),
    ),
    (EXTRA,),
)
TOY_STATE = DeviceState(
    "toy",
    1,
    3,
    {
        "control": 0xDEADBEEF,
        "lines": [{"level": i, "edge": i == 1} for i in range(3)],
        "count": 2,
        "queue": [5, 2**64 - 1],
    },
    (DeviceState("toy/extra", 0, 1, {"clock": 16_000}),),
)
TABLE = {"toy": TOY}


class PieceSource:
    """Bytes that come in pieces of at most `step`, as a slow channel's do."""

    def __init__(self, data: bytes, step: int | None = None) -> None:
        self._data = memoryview(data)
        self._step = step or max(1, len(data))
        self.reads = 0

    def readinto(self, buffer: memoryview) -> int:
        piece = self._data[: min(self._step, len(buffer))]
        buffer[: len(piece)] = piece
        self._data = self._data[len(piece) :]
        self.reads += 1
        return len(piece)

    @property
    def left(self) -> int:
        return len(self._data)


def small_stream(block: RamBlock) -> bytes:
    """A stream with everything in it: the block's pages in two parts, a command, a device, a description."""
    half = block.pages // 2
    parts = [
        sections.header(sections.Configuration("toy-1.0")),
        sections.command(Command.OPEN_RETURN_PATH),
        sections.section_start(2, "ram", 0, 4) + ram_setup([(block.name, block.size)]) + sections.footer(2),
        sections.section_part(2),
        encode_pages(block, np.arange(half), suffix=END_OF_RECORDS + sections.footer(2)).tobytes(),
        sections.command(Command.PING, b"\0\0\0\7"),
        encode_pages(
            block,
            np.arange(half, block.pages),
            prefix=sections.section_end(2),
            suffix=END_OF_RECORDS + sections.footer(2),
        ).tobytes(),
        sections.device_section(5, TOY, TOY_STATE),
        sections.end_of_stream(),
        sections.vm_description(b'{"page_size": 4096, "devices": []}'),
    ]
    return b"".join(parts)


def load(
    reader: StreamReader, decoder: RamDecoder, see: Callable[[Event], None] = lambda event: None
) -> list[DeviceState]:
    """Read a whole stream as a destination does; the states of its devices."""
    states = []
    while (event := reader.next()) is not None:
        see(event)
        match event:
            case SectionPiece(SectionType.START, header) if header.name == "ram":
                decoder.read_setup(reader)
            case SectionPiece(SectionType.PART | SectionType.END, header) if header.name == "ram":
                decoder.read_records(reader)
            case SectionPiece(SectionType.FULL, header) if header.name in TABLE:
                states.append(reader.read_state(TABLE[header.name]))
            case SectionPiece(SectionType.FULL, _):
                raise reader.error("no device here has a section of this name")
            case SectionPiece(_, _):
                raise reader.error("only RAM comes in parts")
            case CommandPiece() | EndOfStream() | VmDescription():
                pass
    return states


def outcome(data: bytes, decoder: RamDecoder, step: int | None = None) -> StreamError | list[DeviceState]:
    """What a destination makes of a stream: its device states, or the error it stops with."""
    try:
        return load(StreamReader(PieceSource(data, step), 1 << 14), decoder)
    except StreamError as error:
        return error
