"""Reading the stream: an incremental parser that hands out one piece after the other.

The reader knows the frame: header, sections, footers, commands. Whoever uses it reads each section's body,
between two calls of `next`, with a `VmStateDescription` or a `RamDecoder`::

    while (event := reader.next()) is not None:
        match event:
            case Configuration(): ...
            case SectionPiece(SectionType.FULL, header): state = reader.read_state(description)
            case SectionPiece(_, header): decoder.read_records(reader)
            case CommandPiece(kind, payload): ...
            case EndOfStream(): ...
            case VmDescription(text): ...

Nothing is read beyond what the current piece needs: as long as the staging buffer holds enough bytes the
source is not asked, so that a peer which waits for an answer before it goes on never waits in vain.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sterna.stream.sections import CONFIGURATION, CONFIGURATION_SECTION, Configuration
from sterna.stream.vmstate import DeviceState, VmStateDescription
from sterna.stream.wire import (
    MAGIC,
    SECTION_LIMIT,
    TAKE_LIMIT,
    VERSION,
    VMDESC_LIMIT,
    Command,
    SectionType,
    StreamCut,
    StreamError,
    StreamUnsupported,
)

STAGING_BYTES = 128 << 10
"""Size of the staging buffer: about what one system call takes from a socket, and small enough to stay in the
cache until its pages have been copied out. Measured over loopback TCP, 1 MiB is a third slower.
"""

_PAYLOAD_BYTES = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.POSTCOPY_LISTEN: 0,
    Command.POSTCOPY_RUN: 0,
    Command.PACKAGED: 4,
    Command.POSTCOPY_RESUME: 0,
    Command.SWITCHOVER_START: 0,
}


class StreamSource(Protocol):
    """Where the stream comes from."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Wait until there are bytes, and put those that are there (not necessarily as many as fit) into
        `buffer`.

        :return: their number; 0 at the end of the stream
        :raise OSError: When the channel fails.
        """
        ...


@dataclass(frozen=True)
class SectionHeader:
    """What opens a section.

    :ivar section_id: number by which further parts and footers refer to the section
    :ivar name: such as ``ram`` or ``cpu``
    """

    section_id: int
    name: str
    instance_id: int
    version: int

    def __str__(self) -> str:
        return f"{self.name} (instance {self.instance_id})" if self.instance_id else self.name


@dataclass(frozen=True)
class SectionPiece:
    """A section's body comes next: a first, further or last part (START, PART, END) or all of it (FULL)."""

    type: SectionType
    header: SectionHeader


@dataclass(frozen=True)
class CommandPiece:
    """A command to the destination.

    :ivar kind: a `Command`, or a number that is none
    """

    kind: int
    payload: bytes


@dataclass(frozen=True)
class EndOfStream:
    """All sections have come. A description may follow."""


@dataclass(frozen=True)
class VmDescription:
    """The stream's description of itself.

    :ivar text: JSON
    """

    text: bytes


Event = Configuration | SectionPiece | CommandPiece | EndOfStream | VmDescription


class StreamReader:
    """Takes a stream apart. After an error it cannot go on.

    :param source: where the bytes come from
    :param staging_bytes: size of the staging buffer, at least 16 KiB

    :ivar staging: the staging buffer, `shape (staging_bytes,)`, dtype uint8
    """

    def __init__(self, source: StreamSource, staging_bytes: int = STAGING_BYTES) -> None:
        if staging_bytes < 1 << 14:
            raise ValueError(f"a staging buffer of {staging_bytes} bytes is too small")
        self._source = source
        self.staging: NDArray[np.uint8] = np.zeros(staging_bytes, dtype=np.uint8)
        self._view = self.staging.data
        self._at = 0
        self._end = 0
        self._base = 0
        self._sections: dict[int, SectionHeader] = {}
        self._names: set[tuple[str, int]] = set()
        self._unfinished: set[int] = set()
        self._open: SectionHeader | None = None
        self._section: str | None = None
        self._last: str | None = None
        self._started = False
        self._ended = False
        self._described = False

    # The byte source that descriptions and decoders read from.

    @property
    def section(self) -> str | None:
        """Name of the section being read, for errors."""
        return self._section

    @property
    def offset(self) -> int:
        """Offset in the stream of the next byte."""
        return self._base + self._at

    @property
    def known_sections(self) -> Collection[int]:
        """Numbers of the sections that have been opened."""
        return self._sections.keys()

    @property
    def unfinished_sections(self) -> Collection[int]:
        """Numbers of those whose last part has not come."""
        return self._unfinished

    @property
    def window(self) -> tuple[int, int]:
        """The bytes at hand: from where to where in `staging`."""
        return self._at, self._end

    def advance(self, at: int) -> None:
        """The bytes at hand have been used up to the position `at` of `staging`."""
        assert self._at <= at <= self._end
        self._at = at

    def fill(self) -> None:
        """Wait for at least one more byte at hand; positions in `staging` change.

        :raise StreamError: When the stream ends, or its channel fails.
        """
        if not self._fill():
            after = f", after section {self._last!r}" if self._section is None and self._last else ""
            raise self.cut(f"the stream is cut short here{after}")

    def take(self, size: int) -> bytes:
        if size > TAKE_LIMIT:
            raise self.error(f"{size} bytes asked for, the limit is {TAKE_LIMIT}")
        if size <= self._end - self._at:
            self._at += size
            return bytes(self._view[self._at - size : self._at])
        out = bytearray()
        while len(out) < size:
            if self._at == self._end:
                self.fill()
            step = min(size - len(out), self._end - self._at)
            out += self._view[self._at : self._at + step]
            self._at += step
        return bytes(out)

    def take_into(self, buffer: memoryview) -> None:
        """The next bytes, as many as fit into `buffer`; what is not at hand comes from the source without a detour.

        :raise StreamError: When the stream ends before them.
        """
        done = min(len(buffer), self._end - self._at)
        buffer[:done] = self._view[self._at : self._at + done]
        self._at += done
        while done < len(buffer):
            got = self._read(buffer[done:])
            if not got:
                raise self.cut("the stream is cut short here")
            self._base += got
            done += got

    def peek(self, size: int) -> bytes:
        assert size < len(self._view)
        while self._end - self._at < size and self._fill():
            pass
        return bytes(self._view[self._at : min(self._at + size, self._end)])

    def error(self, message: str, at: int | None = None) -> StreamError:
        """An error in the current section, at the current position if `at` does not say otherwise."""
        return StreamError(message, self._section, self.offset if at is None else at)

    def cut(self, message: str) -> StreamCut:
        """An error at the stream's end."""
        return StreamCut(message, self._section, self._base + self._end)

    def _fill(self) -> int:
        # What is left is less than one record, so that moving it costs little and makes room for a large
        # read.
        rest = self._end - self._at
        assert rest < len(self._view)
        self.staging[:rest] = self.staging[self._at : self._end]
        self._base += self._at
        self._at, self._end = 0, rest
        got = self._read(self._view[self._end :])
        self._end += got
        return got

    def _read(self, buffer: memoryview) -> int:
        try:
            return self._source.readinto(buffer)
        except OSError as error:
            raise self.error(f"the channel failed: {error}", at=self._base + self._end) from error

    def _be16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def _be32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    # The frame.

    def next(self) -> Event | None:
        """The next piece. The body of a section that was opened before must have been read.

        :return: None when there is nothing more
        :raise StreamError: When the stream breaks its format, is cut short, or its channel fails.
        """
        if not self._started:
            self._started = True
            return self._read_header()
        if self._ended:
            return self._read_description()
        if self._open is not None:
            self._read_footer(self._open)
        at = self.offset
        kind = self.take(1)[0]
        if kind in (SectionType.START, SectionType.FULL):
            return self._read_opening(SectionType(kind))
        if kind in (SectionType.PART, SectionType.END):
            return self._read_part(SectionType(kind))
        if kind == SectionType.COMMAND:
            return self._read_command()
        if kind == SectionType.EOF:
            if self._unfinished:
                names = ", ".join(sorted(str(self._sections[i]) for i in self._unfinished))
                text = f"the stream ends before the last part of: {names}; with background-snapshot or dirty-bitmaps it has none"
                raise StreamUnsupported(text, self._section, at)
            self._ended = True
            return EndOfStream()
        raise self.error(f"no part of a stream begins with the byte {kind:#04x}", at)

    def read_state(self, description: VmStateDescription) -> DeviceState:
        """Read the open section's body as the description says.

        :raise StreamError: When the body does not fit the description.
        """
        header = self._open
        assert header is not None
        return description.decode(
            self, name=header.name, instance_id=header.instance_id, version=header.version
        )

    def _read_header(self) -> Configuration:
        self._section = "header"
        magic = self._be32()
        if magic != MAGIC:
            raise self.error(
                f"this is no migration stream: it begins with {magic:#010x}, not {MAGIC:#010x}", 0
            )
        version = self._be32()
        if version != VERSION:
            raise self.error(f"version {version} of the stream's format; only {VERSION} is supported", 4)
        kind = self.take(1)[0]
        if kind != SectionType.CONFIGURATION:
            raise self.error(f"the configuration section is missing: {kind:#04x} begins another part", 8)
        self._section = CONFIGURATION_SECTION
        configuration = Configuration.from_state(CONFIGURATION.decode(self))
        self._leave()
        return configuration

    def _read_opening(self, kind: SectionType) -> SectionPiece:
        at = self.offset - 1
        section_id = self._be32()
        raw = self.take(self.take(1)[0])
        name = raw.decode("utf-8", "backslashreplace")
        header = SectionHeader(section_id, name, self._be32(), self._be32())
        if not raw:
            raise self.error(f"section {section_id} has an empty name", at)
        if section_id in self._sections:
            other = self._sections[section_id]
            raise StreamError(f"its number {section_id} is already that of section {other}", str(header), at)
        if (name, header.instance_id) in self._names:
            raise StreamError("the section comes twice", str(header), at)
        if len(self._sections) >= SECTION_LIMIT:
            raise StreamError(f"more than {SECTION_LIMIT} sections", str(header), at)
        self._sections[section_id] = header
        self._names.add((name, header.instance_id))
        if kind == SectionType.START:
            self._unfinished.add(section_id)
        self._enter(header)
        return SectionPiece(kind, header)

    def _read_part(self, kind: SectionType) -> SectionPiece:
        at = self.offset - 1
        section_id = self._be32()
        if section_id not in self._unfinished:
            header = self._sections.get(section_id)
            if header is None:
                raise self.error(f"a part of section {section_id}, which has not been started", at)
            raise StreamError("a further part after the last", str(header), at)
        if kind == SectionType.END:
            self._unfinished.remove(section_id)
        header = self._sections[section_id]
        self._enter(header)
        return SectionPiece(kind, header)

    def _enter(self, header: SectionHeader) -> None:
        self._open = header
        self._section = str(header)

    def _leave(self) -> None:
        self._last, self._section = self._section, None

    def _read_footer(self, header: SectionHeader) -> None:
        at = self.offset
        kind = self.take(1)[0]
        if kind != SectionType.FOOTER:
            raise self.error(f"the section's footer is missing: {kind:#04x} in its place", at)
        section_id = self._be32()
        if section_id != header.section_id:
            raise self.error(f"the footer is that of section {section_id}, not {header.section_id}", at)
        self._open = None
        self._leave()

    def _read_command(self) -> CommandPiece:
        at = self.offset - 1
        self._section = "command"
        kind = self._be16()
        size = self._be16()
        expected = _PAYLOAD_BYTES.get(Command(kind)) if kind in Command.__members__.values() else None
        if expected is not None and size != expected:
            raise self.error(f"{Command(kind).name} has {size} bytes of payload, not {expected}", at)
        piece = CommandPiece(kind, self.take(size))
        self._leave()
        return piece

    def _read_description(self) -> VmDescription | CommandPiece | None:
        if self._described:
            # Between two sternas the handover follows.
            if self.peek(1) != bytes((SectionType.COMMAND,)):
                return None
            self.take(1)
            return self._read_command()
        self._described = True
        kind = self.peek(1)
        if not kind:
            return None
        self._section = "vmdesc"
        if kind[0] != SectionType.VMDESCRIPTION:
            raise self.error(f"the byte {kind[0]:#04x} after the end of the stream")
        at = self.offset
        self.take(1)
        size = self._be32()
        if size > VMDESC_LIMIT:
            raise self.error(f"a description of {size} bytes, the limit is {VMDESC_LIMIT}", at)
        text = self.take(size)
        self._leave()
        return VmDescription(text)
