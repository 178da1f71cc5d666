"""What a survey of a stream finds, as plain data."""

from dataclasses import dataclass, field

from sterna.analysis.channel_survey import ChannelSurvey
from sterna.analysis.ram_survey import PageSurvey, PassSurvey, RamBlockSurvey, missing
from sterna.memory.digest import RamDigest
from sterna.stream.reader import SectionHeader
from sterna.stream.sections import Configuration
from sterna.stream.vmstate import DeviceState
from sterna.stream.wire import RAM_SECTION, Command, StreamCut, StreamError, StreamUnsupported


@dataclass(frozen=True)
class StreamFault:
    """Where a stream is broken.

    :ivar text: the whole error, in one line
    :ivar message: what is wrong there
    :ivar section: the section, where one was being read
    :ivar field: path of the field within it
    :ivar offset: offset of the first bad byte, where there is one
    :ivar cut: there is no bad byte, the stream has ended
    :ivar unsupported: what is there cannot be read here, so whether it is damaged cannot be told
    """

    text: str
    message: str
    section: str | None
    field: str | None
    offset: int | None
    cut: bool = False
    unsupported: bool = False

    @staticmethod
    def of(error: StreamError) -> "StreamFault":
        cut, unsupported = isinstance(error, StreamCut), isinstance(error, StreamUnsupported)
        return StreamFault(
            str(error), error.message, error.section, error.field, error.offset, cut, unsupported
        )


@dataclass(frozen=True)
class SectionSurvey:
    """One section.

    :ivar offset: offset in the stream of its first part
    :ivar parts: number of parts
    :ivar bytes: bytes of the parts' bodies
    :ivar state: what it says, if it is a device that the stream describes
    :ivar digest: XXH3-64 of the bodies; 0 for RAM
    """

    header: SectionHeader
    offset: int
    parts: int
    bytes: int
    digest: int
    state: DeviceState | None

    @property
    def is_ram(self) -> bool:
        return self.header.name == RAM_SECTION


@dataclass(frozen=True)
class CommandSurvey:
    """Commands of one kind.

    :ivar kind: a `Command`, or a number that is none
    :ivar offset: offset in the stream of the first
    """

    kind: int
    count: int
    offset: int

    @property
    def name(self) -> str:
        return Command(self.kind).name if self.kind in Command.__members__.values() else f"{self.kind:#x}"


@dataclass(frozen=True)
class ByteKinds:
    """What a stream's bytes are spent on; together, all of them.

    :ivar page_data: pages of guest RAM
    :ivar zero_records: records of pages that are all zero
    :ivar changes: XBZRLE records, of what changed in pages
    :ivar record_headers: offsets, flags and block names before pages, and the ends of parts
    :ivar ram_blocks: the list of RAM blocks
    :ivar devices: bodies of all other sections
    :ivar commands: commands to the destination
    :ivar header: magic number and configuration
    :ivar framing: openings and footers of sections, the end byte
    :ivar description: the stream's description of itself
    :ivar trailing: bytes after the end
    :ivar channel_pages: pages on the channels of multifd, compressed or not
    :ivar channel_headers: all other bytes of those channels
    """

    page_data: int = 0
    zero_records: int = 0
    changes: int = 0
    record_headers: int = 0
    ram_blocks: int = 0
    devices: int = 0
    commands: int = 0
    header: int = 0
    framing: int = 0
    description: int = 0
    trailing: int = 0
    channel_pages: int = 0
    channel_headers: int = 0


@dataclass(frozen=True)
class StreamSurvey:
    """What is in a stream, up to its end or its fault.

    :ivar bytes: how many bytes there are, up to the fault of the main stream if it has one, without those of multifd's channels
    :ivar configuration: None when the stream broke before it
    :ivar page_bits: log2 of the page size of RAM records
    :ivar fault: the first one, if there is any
    :ivar main_fault: that of the main stream, which is read on when a channel is broken
    :ivar complete: whether the byte came that ends the stream; only its description may follow
    :ivar described: whether the stream describes its devices
    :ivar absent: devices that it describes but does not have
    :ivar page_surveys: what is remembered of each page, by block
    :ivar channels: of multifd, by number
    :ivar digest: of RAM as the destination ends up with it; None without digests, or when the stream broke
    """

    bytes: int
    configuration: Configuration | None
    page_bits: int
    sections: tuple[SectionSurvey, ...]
    blocks: tuple[RamBlockSurvey, ...]
    passes: tuple[PassSurvey, ...]
    commands: tuple[CommandSurvey, ...]
    kinds: ByteKinds
    described: bool
    absent: tuple[tuple[str, int], ...]
    fault: StreamFault | None
    page_surveys: tuple[PageSurvey, ...] = field(repr=False, compare=False)
    digest: RamDigest | None = field(default=None, repr=False, compare=False)
    channels: tuple[ChannelSurvey, ...] = ()
    complete: bool = False
    main_fault: StreamFault | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of the stream and of its channels."""
        return self.bytes + sum(channel.bytes for channel in self.channels)

    def flaw(self) -> StreamFault | None:
        """The first thing that is wrong with the stream: its fault, or that something is not in it that a
        destination needs.
        """
        if self.fault is not None:
            return self.fault
        end = self.bytes
        if not self.blocks:
            return StreamFault.of(StreamError("there is no guest RAM in the stream", RAM_SECTION, end))
        block = missing(self.blocks)
        if block is not None:
            assert block.first_missing is not None
            where = block.first_missing << self.page_bits
            text = f"RAM block {block.name!r}: page at {where:#x} never came"
            if not self.channels and not any(one.normal for one in self.blocks):
                text += "; with multifd it came on a channel, which must be given too"
            return StreamFault.of(StreamError(text, RAM_SECTION, end))
        for section in self.sections:
            if self.described and section.state is None and not section.is_ram and section.parts == 1:
                text = "the stream's description does not describe it"
                return StreamFault.of(StreamError(text, str(section.header), section.offset))
        if self.absent:
            name, instance = self.absent[0]
            text = f"described is {name!r}, instance {instance}, but the stream has no such section"
            return StreamFault.of(StreamError(text, "vmdesc", end))
        return None
