"""Sections and RAM blocks of the source that this machine does not have: kept until the guest's machine can judge them.

A section of a device that is not here is kept as bytes; what they mean is known when the stream's own description has
come, after its end. A RAM block that is not here gets memory for as long as the migration takes. In the end the guest
judges each: it is left behind and reported, or refused with section, field and value. Nothing is guessed, and nothing is left
behind without a report.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from sterna.memory.address import PAGE_SIZE
from sterna.memory.digest import CHUNK_SIZE, populated_chunks
from sterna.memory.ram import RamBlock, RamError
from sterna.memory.rollingdigest import digest_ram
from sterna.migration.guest import MigratableGuest
from sterna.stream.body import BytesSource
from sterna.stream.description import Descriptions
from sterna.stream.footer import until_footer
from sterna.stream.reader import SectionHeader, StreamReader
from sterna.stream.unmatched import Judgement, RamUse, UnmatchedPart
from sterna.stream.vmstate import DeviceState
from sterna.stream.wire import RAM_SECTION, StreamError

SECTIONS_LIMIT = 1 << 20
"""Most bytes of sections that are kept; QEMU's `virt` with a network card has 48 kB. What they become when they are taken apart
is bounded by what may be described."""
RAM_LIMIT = 256 << 20
"""Most bytes of RAM blocks that get memory; QEMU's `virt` has 128 MiB of flash."""

_IGNORED = "ignored, as its user asked (x-sterna-ignore-sections)"
_ADVICE = "to go on without it, name it in x-sterna-ignore-sections"
_SHOWN_BYTES = 32
_SHOWN_ELEMENTS = 16
_ERASED = 0xFF


class UnmatchedParts:
    """What one stream brought.

    :param ignored: names of sections and RAM blocks that do not matter, whatever they hold
    """

    def __init__(self, guest: MigratableGuest, ignored: Collection[str]) -> None:
        self._guest = guest
        self._ignored = ignored
        self._sections: list[tuple[SectionHeader, BytesSource]] = []
        self._blocks: dict[str, tuple[RamBlock, RamUse | None]] = {}
        self._section_bytes = 0
        self._ram_bytes = 0

    @property
    def needs_description(self) -> bool:
        """Whether there are sections that only the stream's description can explain."""
        return any(header.name not in self._ignored for header, _ in self._sections)

    @property
    def ram_blocks(self) -> list[RamBlock]:
        """The RAM blocks that got memory."""
        return [block for block, _ in self._blocks.values()]

    # -- while the stream comes in ---------------------------------------------------------------------------

    def take_section(self, reader: StreamReader, header: SectionHeader) -> None:
        """Keep the body of the section that has just been opened.

        :raise StreamError: When it is longer than what is kept.
        """
        body, at = bytearray(), reader.offset
        for piece in until_footer(reader, header.section_id):
            self._section_bytes += len(piece)
            if self._section_bytes > SECTIONS_LIMIT:
                raise reader.error(
                    f"more than {SECTIONS_LIMIT} bytes of sections that this machine has no device for"
                )
            body += piece
        self._sections.append((header, BytesSource(body, str(header), at)))

    def adopt(self, name: str, size: int) -> RamBlock | None:
        """Memory for a RAM block, or None when the guest cannot do without it."""
        use = None if name in self._ignored else self._guest.judge_ram_block(name, size)
        if use is None and name not in self._ignored:
            return None
        if self._ram_bytes + size > RAM_LIMIT:
            return None
        try:
            block = RamBlock(name, size)
        except RamError:
            return None
        self._ram_bytes += size
        self._blocks[name] = block, use
        return block

    def check_block(self, block: RamBlock | None) -> None:
        """Look early whether a block holds what the guest would miss: the source has not stopped its guest yet.

        :raise StreamError: When it does.
        """
        if block is None or block.name not in self._blocks:
            return
        if self._blocks[block.name][1] is RamUse.BLANK and (offset := _content(block)) is not None:
            raise StreamError(
                f"RAM block {block.name!r} is not here, and the guest would miss what it holds at {offset:#x}; "
                + _ADVICE,
                RAM_SECTION,
            )

    # -- when all of it is there -----------------------------------------------------------------------------

    def judge(self, description: bytes | None) -> tuple[UnmatchedPart, ...]:
        """Have the guest judge everything.

        :param description: the stream's description of itself
        :raise StreamError: When the guest would miss something, a section is not described, or not as it is.
        """
        descriptions = None
        if self._sections and description is not None:
            try:
                descriptions = Descriptions(description)
            except StreamError:
                if self.needs_description:
                    raise
        found = [self._judge_section(header, body, descriptions) for header, body in self._sections]
        return (*found, *self._judge_blocks())

    def _judge_section(
        self, header: SectionHeader, body: BytesSource, descriptions: Descriptions | None
    ) -> UnmatchedPart:
        ignored = header.name in self._ignored
        size, raw = body.left, body.peek(body.left)
        fields: dict[str, Any] = {}
        judgement = Judgement(False, "the stream does not describe it")
        try:
            if descriptions is not None:
                state = _decode(header, body, descriptions)
                fields = _shown(state)
                judgement = self._guest.judge_section(state)
        except StreamError:
            if not ignored:
                raise
        if not (judgement.harmless or ignored):
            # QEMU's words, and then ours.
            raise StreamError(
                f"Unknown savevm section or instance {header.name!r} {header.instance_id}: this machine has no such "
                f"device, and the guest may miss it: {judgement.reason}; {_ADVICE}",
                str(header),
            )
        return UnmatchedPart(
            "section",
            header.name,
            header.instance_id,
            size,
            xxhash.xxh3_64_hexdigest(raw),
            not judgement.harmless,
            judgement.reason if judgement.harmless else _IGNORED,
            fields,
        )

    def _judge_blocks(self) -> Iterator[UnmatchedPart]:
        for block, _ in self._blocks.values():
            self.check_block(block)
        digests = digest_ram(self.ram_blocks).blocks if self._blocks else ()
        for digest, (block, use) in zip(digests, self._blocks.values(), strict=True):
            text = xxhash.xxh3_64_hexdigest(digest.chunks.astype(">u8").tobytes())
            reason = _IGNORED if use is None else use.value
            yield UnmatchedPart("ram", block.name, 0, block.size, text, use is None, reason)

    def close(self) -> None:
        """Give the memory back."""
        for block, _ in self._blocks.values():
            block.close()
        self._blocks.clear()


def _decode(header: SectionHeader, body: BytesSource, descriptions: Descriptions) -> DeviceState:
    state = descriptions[header.name, header.instance_id].decode(
        body, name=header.name, instance_id=header.instance_id, version=header.version
    )
    if body.left:
        raise body.error(f"{body.left} bytes after the last field that the stream's description has")
    return state


def _content(block: RamBlock) -> int | None:
    """Offset of the first page that is neither zero nor erased; None when there is none."""
    for chunk in np.flatnonzero(populated_chunks(block)).tolist():
        pages = block.data[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE].reshape(-1, PAGE_SIZE)
        first = pages[:, :1]
        blank = (pages == first).all(axis=1) & ((first == 0) | (first == _ERASED))[:, 0]
        if not blank.all():
            return chunk * CHUNK_SIZE + int(blank.argmin()) * PAGE_SIZE
    return None


def _shown(state: DeviceState) -> dict[str, Any]:
    """A section's values as JSON can carry them, its subsections' among them."""
    values: Mapping[str, Any] = state.fields
    shown = {name: _shown_value(value) for name, value in values.items()}
    for subsection in state.subsections:
        shown[f"<{subsection.name}>"] = _shown(subsection)
    return shown


def _shown_value(value: Any) -> Any:
    if isinstance(value, DeviceState):
        return _shown(value)
    if isinstance(value, dict):
        return {name: _shown_value(inner) for name, inner in value.items()}
    if isinstance(value, bytes):
        return value.hex() if len(value) <= _SHOWN_BYTES else f"{len(value)} bytes"
    if isinstance(value, list | tuple):
        if len(value) <= _SHOWN_ELEMENTS:
            return [_shown_value(inner) for inner in value]
        return f"{len(value)} elements"
    return value
