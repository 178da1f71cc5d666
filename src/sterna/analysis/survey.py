"""Surveying a stream: what is in it, without a VM, and without holding its pages unless digests are wanted.

A survey reads any stream of version 3, sterna's or QEMU's, and gives sections, blocks of guest RAM, passes,
bytes by kind and the state of the devices. Devices need not be known: the stream's own description says what
their bytes are. It stands at the stream's end, so where the file can be searched it is looked up first; where
it cannot, or where the description is not in its place, a device section ends at its footer, which is searched
for, and its body is decoded when the description has come.

A stream that is broken is surveyed up to the place where it is; one whose multifd channels are broken, to its end without them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import xxhash

from sterna.analysis.channel_survey import Channels, ChannelSurveyor
from sterna.analysis.findings import ByteKinds, CommandSurvey, SectionSurvey, StreamFault, StreamSurvey
from sterna.analysis.ram_survey import RamSurveyor
from sterna.stream.body import BytesSource
from sterna.stream.description import Descriptions
from sterna.stream.footer import FOOTER_BYTES, until_footer
from sterna.stream.reader import (
    CommandPiece,
    EndOfStream,
    SectionHeader,
    SectionPiece,
    StreamReader,
    StreamSource,
    VmDescription,
)
from sterna.stream.sections import Configuration
from sterna.stream.vmstate import DeviceState, VmStateDescription
from sterna.stream.wire import (
    LEGACY_ARM_PAGE_BITS,
    RAM_SECTION,
    RAM_VERSION,
    Command,
    SectionType,
    StreamError,
    StreamUnsupported,
)

DEVICE_LIMIT = 32 << 20
"""Most bytes of device sections that are kept; those of a `virt` machine have 10 kB. A TPM has buffers of megabytes."""
_PAGE_BITS = range(10, 17)
_MULTIFD_MAGIC = bytes.fromhex("11223344")
_CHUNK = 64 << 10
_OTHER_LAYOUTS = ("x-ignore-shared", "mapped-ram")
"""Capabilities with which guest RAM is elsewhere, or laid out otherwise."""


def survey(
    source: StreamSource,
    *,
    description: bytes | None = None,
    digests: bool = False,
    page_digests: bool = False,
    channels: Channels | None = None,
) -> StreamSurvey:
    """Survey a stream. Does not raise: what is wrong is in the survey.

    :param description: the stream's description, if it is known before the stream is read
    :param digests: hold guest RAM as the destination ends up with it, and digest it
    :param page_digests: and each page of it
    :param channels: of multifd
    """
    surveyor = Surveyor(source, description, digests or page_digests, channels)
    surveyor.read()
    return surveyor.result(page_digests=page_digests)


class _Beside:
    """A source that has something else done whenever it would be waited for."""

    def __init__(self, source: StreamSource, action: Callable[[], None]) -> None:
        self._source = source
        self._action = action

    def readinto(self, buffer: memoryview) -> int:
        self._action()
        return self._source.readinto(buffer)


class _Metered:
    """A byte source that gives no more than is left of a budget, and digests what it gives."""

    def __init__(self, reader: StreamReader, budget: int) -> None:
        self._reader = reader
        self._digest = xxhash.xxh3_64()
        self.left = budget

    @property
    def section(self) -> str | None:
        return self._reader.section

    @property
    def offset(self) -> int:
        return self._reader.offset

    @property
    def digest(self) -> int:
        return int(self._digest.intdigest())

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise self._reader.error(f"more than {DEVICE_LIMIT} bytes of device sections")
        self.left -= size
        piece = self._reader.take(size)
        self._digest.update(piece)
        return piece

    def peek(self, size: int) -> bytes:
        return self._reader.peek(size)


@dataclass
class _Section:
    """A section while the stream is being read.

    :ivar body: what is to be decoded when the description has come
    """

    header: SectionHeader
    offset: int
    parts: int = 0
    bytes: int = 0
    digest: "xxhash.xxh3_64 | int" = 0
    state: DeviceState | None = None
    body: BytesSource | None = None

    def frozen(self) -> SectionSurvey:
        digest = self.digest if isinstance(self.digest, int) else int(self.digest.intdigest())
        return SectionSurvey(self.header, self.offset, self.parts, self.bytes, digest, self.state)


class Surveyor:
    """Reads one stream; `survey` in steps, for a stream that is still coming.

    :param watch: called after each piece of the stream, in the thread that reads

    :ivar complete: whether the byte came that ends the stream
    """

    def __init__(
        self,
        source: StreamSource,
        description: bytes | None = None,
        digests: bool = False,
        channels: Channels | None = None,
        watch: Callable[["Surveyor"], None] = lambda surveyor: None,
    ) -> None:
        self._fault: StreamFault | None = None
        self._channel_fault: StreamFault | None = None
        self.complete = self._ended = False
        self._watch = watch
        self._given_channels = channels
        self._channels: ChannelSurveyor | None = None
        self._reader = StreamReader(_Beside(source, self._read_ahead))
        self._digests = digests
        self._page_bytes: int | None = None
        self._descriptions: dict[tuple[str, int], VmStateDescription] = {}
        if description is not None:
            try:
                self._describe(Descriptions(description))
            except StreamError:
                pass  # it is reported when its turn comes, with its place
        self._configuration: Configuration | None = None
        self._page_bits = 0
        self._ram: RamSurveyor | None = None
        self._sections: dict[int, _Section] = {}
        self._commands: dict[int, CommandSurvey] = {}
        self._left = DEVICE_LIMIT
        self._described = False
        self._absent: tuple[tuple[str, int], ...] = ()
        self._kinds = dict.fromkeys(
            ("ram_blocks", "record_parts", "devices", "commands", "header", "description", "trailing"), 0
        )

    def result(self, *, page_digests: bool = False) -> StreamSurvey:
        """What has been read.

        :param page_digests: digest pages too, if pages are held and all was read
        """
        # Where both are broken, the channels were first: with the main stream, reading ends.
        fault = self._channel_fault or self._fault
        whole = self._digests and self._ended and fault is None
        channels = self._channels.surveys() if self._channels else ()
        kinds, ram = dict(self._kinds), self._ram
        parts = kinds.pop("record_parts")
        data = ram.page_data_bytes if ram else 0
        zero = ram.zero_record_bytes if ram else 0
        changes = ram.changed_record_bytes if ram else 0
        framing = self._reader.offset - sum(kinds.values()) - parts
        return StreamSurvey(
            self._reader.offset,
            self._configuration,
            self._page_bits,
            tuple(section.frozen() for section in self._sections.values()),
            ram.blocks() if ram else (),
            ram.passes() if ram else (),
            tuple(self._commands.values()),
            ByteKinds(
                data,
                zero,
                changes,
                parts - data - zero - changes,
                framing=framing,
                channel_pages=sum(channel.page_bytes for channel in channels),
                channel_headers=sum(channel.bytes - channel.page_bytes for channel in channels),
                **kinds,
            ),
            self._described,
            self._absent,
            fault,
            ram.page_surveys(digests=whole and page_digests) if ram else (),
            ram.digest() if ram and whole else None,
            channels,
            self.complete,
            self._fault,
        )

    def _read_ahead(self) -> None:
        self._beside(lambda channels: channels.read_ahead(self._reader.offset))

    def _beside(self, action: Callable[[ChannelSurveyor], None]) -> None:
        """Do something with the channels, if there are any. One that is broken ends the reading of all of them, but not of the
        main stream: whether that is whole decides over the guest, and anybody can connect beside it.
        """
        if not self._channels or self._channel_fault is not None:
            return
        try:
            action(self._channels)
        except StreamError as error:
            self._channel_fault = StreamFault.of(error)
            self._channels.close()

    @contextmanager
    def _counted(self, kind: str) -> Iterator[None]:
        start = self._reader.offset
        try:
            yield
        finally:
            self._kinds[kind] += self._reader.offset - start

    def read(self) -> None:
        """Read the whole stream. Does not raise: what is wrong is in the result."""
        try:
            self._read()
        except StreamError as error:
            self._fault = StreamFault.of(error)
        self._ended = True

    def _read(self) -> None:
        reader = self._reader
        if reader.peek(4) == _MULTIFD_MAGIC:
            raise reader.error("this is a channel of multifd, which is read beside its main stream")
        with self._counted("header"):
            configuration = reader.next()
        assert isinstance(configuration, Configuration)
        self._configure(configuration)
        footer = 0
        while True:
            at = reader.offset + footer
            footer = 0
            match reader.next():
                case SectionPiece() as piece:
                    self._read_section(piece, at)
                    footer = FOOTER_BYTES
                    self._watch(self)
                case CommandPiece() as command:
                    self._note_command(command)
                case EndOfStream():
                    self.complete = True
                    self._watch(self)
                    break
        self._read_end()
        if self._ram is None and self._given_channels and (unread := self._given_channels.sources()):
            text = "nothing of it was read: the main stream has no guest RAM"
            self._channel_fault = StreamFault.of(StreamError(text, unread[0].label))
        self._beside(ChannelSurveyor.read_end)

    def _configure(self, configuration: Configuration) -> None:
        self._configuration = configuration
        bits = configuration.page_bits
        if bits is None:
            # Machines of one page size do not say which; the description does.
            bits = self._page_bytes.bit_length() - 1 if self._page_bytes else LEGACY_ARM_PAGE_BITS
        if bits not in _PAGE_BITS:
            limits = f"{1 << _PAGE_BITS[0]} to {1 << _PAGE_BITS[-1]} bytes"
            raise StreamError(f"pages of 2^{bits} bytes; possible are {limits}", "configuration", 9)
        for capability in _OTHER_LAYOUTS:
            if capability in configuration.capabilities:
                text = f"streams with the capability {capability} cannot be read"
                raise StreamUnsupported(text, "configuration", 9)
        self._page_bits = bits

    def _note_command(self, command: CommandPiece) -> None:
        if self._given_channels:
            self._given_channels.note(command)
        size = 5 + len(command.payload)
        at = self._reader.offset - size
        self._kinds["commands"] += size
        before = self._commands.get(command.kind, CommandSurvey(command.kind, 0, at))
        self._commands[command.kind] = CommandSurvey(command.kind, before.count + 1, before.offset)
        if command.kind == Command.PACKAGED:
            raise StreamUnsupported("a packaged stream; streams with postcopy cannot be read", "command", at)

    def _read_section(self, piece: SectionPiece, at: int) -> None:
        header = piece.header
        section = self._sections.setdefault(header.section_id, _Section(header, at))
        section.parts += 1
        start = self._reader.offset
        try:
            if header.name == RAM_SECTION:
                self._read_ram(piece)
            elif piece.type is not SectionType.FULL:
                with self._counted("devices"):
                    self._read_part(section)
            else:
                with self._counted("devices"):
                    self._read_device(section)
        finally:
            section.bytes += self._reader.offset - start

    def _read_ram(self, piece: SectionPiece) -> None:
        reader, header = self._reader, piece.header
        if header.version != RAM_VERSION or header.instance_id:
            text = f"version {header.version}, instance {header.instance_id} of the section"
            raise reader.error(f"{text}; only version {RAM_VERSION}, instance 0 can be read")
        if piece.type is SectionType.START:
            self._ram = RamSurveyor(self._page_bits, self._digests)
            with self._counted("ram_blocks"):
                self._ram.read_setup(reader)
            if self._given_channels:
                self._channels = ChannelSurveyor(self._given_channels, self._page_bits, self._ram)
                self._beside(lambda channels: channels.read_epoch(reader.offset))
                self._channels.end_epoch()
        elif piece.type is SectionType.FULL or self._ram is None:
            raise reader.error("the section must come in parts")
        else:
            self._beside(lambda channels: channels.read_epoch(reader.offset))
            with self._counted("record_parts"):
                self._ram.read_records(reader)
            if self._channels and piece.type is not SectionType.END:
                self._channels.end_epoch()

    def _read_part(self, section: _Section) -> None:
        """A part of a section that only its owner understands."""
        if isinstance(section.digest, int):
            section.digest = xxhash.xxh3_64()
        for piece in until_footer(self._reader, section.header.section_id):
            section.digest.update(piece)

    def _read_device(self, section: _Section) -> None:
        reader, header = self._reader, section.header
        description = self._descriptions.get((header.name, header.instance_id))
        metered = _Metered(reader, self._left)
        try:
            if description is not None:
                section.state = description.decode(
                    metered, name=header.name, instance_id=header.instance_id, version=header.version
                )
                section.digest = metered.digest
                return
        finally:
            self._left = metered.left
        body, at = bytearray(), reader.offset
        for piece in until_footer(reader, header.section_id):
            self._left -= len(piece)
            if self._left < 0:
                raise reader.error(f"more than {DEVICE_LIMIT} bytes of device sections")
            body += piece
        section.body = BytesSource(body, str(header), at)
        section.digest = int(xxhash.xxh3_64_intdigest(body))

    def _describe(self, descriptions: Descriptions) -> None:
        self._page_bytes = descriptions.page_bytes
        self._descriptions = {key: descriptions[key] for key in descriptions}

    def _read_end(self) -> None:
        reader = self._reader
        following = reader.peek(1)
        if following == bytes((SectionType.VMDESCRIPTION,)):
            at = reader.offset
            with self._counted("description"):
                event = reader.next()
            assert isinstance(event, VmDescription)
            self._use_description(event.text, at)
            while isinstance(command := reader.next(), CommandPiece):
                self._note_command(command)
        at = reader.offset
        with self._counted("trailing"):
            while piece := reader.peek(_CHUNK):
                reader.take(len(piece))
        if reader.offset > at:
            raise StreamError(f"{reader.offset - at} bytes after the end of the stream", None, at)

    def _use_description(self, text: bytes, at: int) -> None:
        """Decode what could not be decoded before."""
        try:
            descriptions = Descriptions(text)
        except StreamError as error:
            error.offset = at + 5
            raise
        self._described = True
        self._describe(descriptions)
        if self._page_bytes != 1 << self._page_bits:
            wrong = (
                f"pages of {self._page_bytes} bytes are described; those of RAM have {1 << self._page_bits}"
            )
            raise StreamError(wrong, "vmdesc", at + 5)
        for section in self._sections.values():
            key = section.header.name, section.header.instance_id
            description = self._descriptions.get(key)
            if section.body is None or description is None:
                continue
            source, header = section.body, section.header
            section.state = description.decode(
                source, name=header.name, instance_id=header.instance_id, version=header.version
            )
            if source.left:
                raise source.error(f"{source.left} bytes after the last field")
        have = {(section.header.name, section.header.instance_id) for section in self._sections.values()}
        self._absent = tuple(key for key in self._descriptions if key not in have)
