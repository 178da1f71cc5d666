"""What a ``ram`` section sends: how often each page came, in which passes, and what RAM it leaves behind.

Passes are not marked in the stream. They are derived from the order of its records, see
`sterna.analysis.counts`: a page that is repeated proves a new pass, which began where the order last
went back. A pass that repeats no page of the one before it is not told apart from it, so there may have been
more passes than are found, never fewer (a source that starts a pass in the middle of RAM and wraps round has
the part before the wrap counted to the pass before).

Memory: 8 bytes for each page of guest RAM that is sent. Where digests are wanted pages are held as well, as the
destination has them (`sterna.analysis.ramimage`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.analysis import counts
from sterna.analysis.counts import NEW_PASS, BlockCounts, PageCounts
from sterna.analysis.ramimage import ImageBlock, free_bytes
from sterna.memory.bitmap import Words
from sterna.memory.content import Bytes
from sterna.memory.digest import RamDigest
from sterna.memory.ram import RamError
from sterna.memory.rollingdigest import digest_ram
from sterna.stream.multifd.kernels import place
from sterna.stream.ram.part import Part
from sterna.stream.ram.setup import MULTIFD_FLUSH_TEXT, read_setup
from sterna.stream.reader import StreamReader
from sterna.stream.wire import RamFlag, StreamError, StreamUnsupported

PAGE_LIMIT = 1 << 26
"""Most pages of guest RAM that are surveyed: 256 GiB in pages of 4 KiB. What a stream says of its RAM costs
nothing to say, so it does not decide how much memory is used here.
"""
PASS_LIMIT = 10_000
"""Most passes that are told apart; the last has the rest."""

_SUPPORTED = RamFlag.ZERO | RamFlag.PAGE | RamFlag.EOS | RamFlag.CONTINUE | RamFlag.XBZRLE
_ENCODINGS = {
    RamFlag.COMPRESS_PAGE: "a compressed page; streams with the capability compress cannot be read",
    RamFlag.MULTIFD_FLUSH: MULTIFD_FLUSH_TEXT,
    RamFlag.HOOK: "a hook of RDMA; streams over RDMA cannot be read",
}


@dataclass(frozen=True)
class RamBlockSurvey:
    """One block of guest RAM in a stream.

    :ivar bytes: its size
    :ivar pages: its size in the stream's pages
    :ivar normal: records with a page of it
    :ivar zero: records of pages of it that are all zero
    :ivar changed: XBZRLE records, of what changed in a page of it
    :ivar sent: pages that came at least once
    :ivar repeated: pages that came more than once
    :ivar most: how often the page came that came most often
    :ivar first_missing: the first page that never came
    """

    name: str
    bytes: int
    pages: int
    normal: int
    zero: int
    changed: int
    sent: int
    repeated: int
    most: int
    first_missing: int | None


@dataclass(frozen=True)
class PassSurvey:
    """One pass over guest RAM.

    :ivar number: from 1
    :ivar offset: offset in the stream of its first record
    :ivar normal: records with a page
    :ivar zero: records of pages that are all zero
    :ivar changed: XBZRLE records
    :ivar bytes: bytes of all of them
    """

    number: int
    offset: int
    normal: int
    zero: int
    changed: int
    bytes: int


@dataclass(frozen=True, eq=False)
class PageSurvey:
    """What is remembered of the pages of a block.

    :ivar times: how often each was sent: `shape (pages,)`, dtype uint32
    :ivar digests: XXH3-64 of each page as the destination has it, dtype uint64; empty if they were not asked for
    """

    name: str
    pages: int
    times: NDArray[np.uint32]
    digests: NDArray[np.uint64]


@dataclass(eq=False)
class _Block:
    """A block while its pages come.

    :ivar size: in bytes
    :ivar pages: counts of each
    :ivar data: its bytes, and in `held` which pages of them have been written to; empty where they are not held
    """

    name: str
    size: int
    counts: BlockCounts
    pages: PageCounts
    data: Bytes
    held: Words


class RamSurveyor:
    """Reads the parts of a ``ram`` section.

    :param page_bits: log2 of the stream's page size
    :param digests: whether to hold pages, for digests of them

    :ivar page_data_bytes: bytes of pages so far, those of multifd's channels apart
    :ivar zero_record_bytes: bytes of the records of pages that are all zero
    :ivar changed_record_bytes: bytes of XBZRLE records
    """

    def __init__(self, page_bits: int, digests: bool) -> None:
        self._page_bits = page_bits
        self._keep_digests = digests
        self._image: dict[str, ImageBlock] | None = None
        self._most_held = 0
        self._blocks: dict[str, _Block] = {}
        self._part = Part(self._blocks, page_bits, _refused)
        self._counts = counts.new_counts(page_bits)
        self._passes: list[PassSurvey] = []
        self._packet_pages = 0

    @property
    def page_data_bytes(self) -> int:
        pages = sum(int(block.counts[0]["normal"]) for block in self._blocks.values())
        return (pages - self._packet_pages) << self._page_bits

    @property
    def zero_record_bytes(self) -> int:
        return int(self._counts[0]["zero_bytes"])

    @property
    def changed_record_bytes(self) -> int:
        return int(self._counts[0]["changed_bytes"])

    def digest(self) -> RamDigest | None:
        """Of RAM as the destination has it now; None where pages are not held."""
        if self._image is None:
            return None
        return digest_ram([block.ram for block in self._image.values()])

    def page_surveys(self, *, digests: bool) -> tuple[PageSurvey, ...]:
        """What is remembered of each block's pages, in the stream's order.

        :param digests: whether to digest the pages, if they are held
        """
        image = self._image if digests else None
        return tuple(
            PageSurvey(
                block.name,
                block.pages.size,
                block.pages["times"],
                image[block.name].page_digests() if image else _NO_DIGESTS,
            )
            for block in self._blocks.values()
        )

    def read_setup(self, reader: StreamReader) -> None:
        """Read the body of the section's first part.

        :raise StreamError: When it is no list of RAM blocks, or they are too large to be surveyed.
        """
        at = reader.offset
        first = 0
        blocks = read_setup(reader, self._page_bits)
        pages = sum(size for _, size in blocks) >> self._page_bits
        if pages > PAGE_LIMIT:
            text = f"guest RAM has {pages} pages; at most {PAGE_LIMIT} can be surveyed"
            raise StreamUnsupported(text, reader.section, at)
        if self._keep_digests:
            self._most_held = free_bytes() >> self._page_bits
            try:
                self._image = {name: ImageBlock(name, size, self._page_bits) for name, size in blocks}
            except RamError as error:
                text = f"guest RAM cannot be held for its digests: {error}"
                raise StreamUnsupported(text, reader.section, at) from error
        for name, size in blocks:
            pages = size >> self._page_bits
            image = self._image[name] if self._image else None
            # Memory that is all zero costs nothing before it is written to.
            self._blocks[name] = _Block(
                name,
                size,
                np.array([(first, 0, 0, 0)], dtype=counts.BLOCK_COUNTS),
                np.zeros(pages, dtype=counts.PAGE_COUNTS),
                image.data if image else _NO_RAM,
                image.held if image else _NOT_HELD,
            )
            first += pages

    def read_records(self, reader: StreamReader) -> None:
        """Read the body of a further or last part.

        :raise StreamError: When a record is none, lies outside its block, or is encoded in a way that cannot
            be read. Records before it have been counted.
        """
        while not self._consume(reader):
            pass

    def _consume(self, reader: StreamReader) -> bool:
        """Use the bytes at hand; whether the part has ended."""
        at, end = reader.window
        block = self._part.block
        self._counts[0]["base"] = reader.offset - at
        after, status = counts.count_records(
            reader.staging,
            at,
            end,
            self._part.name,
            self._counts,
            block.counts if block else _NO_COUNTS,
            block.pages if block else _NO_PAGES,
            block.data if block else _NO_RAM,
            block.held if block else _NOT_HELD,
            self._part.rows,
        )
        reader.advance(after)
        self._check_room(reader.section, reader.offset)
        if status == NEW_PASS:
            self._end_pass()
            return False
        return self._part.after(reader, after, status)

    def begin_epoch(self, offset: int) -> None:
        """Pages of multifd's channels follow, and then the main stream's of the same epoch.

        :param offset: offset in the main stream
        """
        counts.next_sweep(offset, self._counts)

    def take_packet(
        self, name: str, pages: NDArray[np.int64], data: bytes | memoryview, wire_bytes: int
    ) -> None:
        """Take pages from a channel of multifd.

        :param name: their RAM block
        :param data: their bytes
        :param wire_bytes: bytes of the packet
        :raise StreamError: When there is no such block, or a page is outside it.
        """
        block = self._blocks.get(name)
        if block is None:
            raise StreamError(f"pages of RAM block {name!r}, which is not in the list of RAM blocks")
        if int(pages.max(initial=-1)) >= block.pages.size:
            where = int(pages.max()) << self._page_bits
            raise StreamError(
                f"page offset {where:#x} is outside RAM block {name!r} of {block.size:#x} bytes"
            )
        now = self._counts[0]
        if now["pass_offset"] < 0:
            now["pass_offset"] = now["sweep_offset"]
        done = 0
        while done < pages.size:
            after = counts.count_pages(pages, done, self._counts, block.pages, block.held)
            now["sweep_normal"] += after - done
            done = after
            if done < pages.size:
                self._end_pass()
        if block.data.size:
            place(np.frombuffer(data, dtype=np.uint8), pages, self._page_bits, block.data)
        now["sweep_bytes"] += wire_bytes
        block.counts[0]["normal"] += pages.size
        self._packet_pages += int(pages.size)
        self._check_room()

    def _check_room(self, section: str | None = None, offset: int | None = None) -> None:
        if self._image and self._counts[0]["held"] > self._most_held:
            limit = self._most_held << self._page_bits
            raise StreamUnsupported(
                f"more guest RAM than can be held here for its digests: {limit} bytes are free",
                section,
                offset,
            )

    def _end_pass(self) -> None:
        """The current sweep proves to be the first of a new pass."""
        self._passes.append(self._pass(with_sweep=False))
        now = self._counts[0]
        now["pass_first_sweep"], now["pass_offset"] = now["sweep"], now["sweep_offset"]
        for what in _SUMS:
            now[f"pass_{what}"] = 0
        if len(self._passes) == PASS_LIMIT - 1:
            now["may_end_pass"] = 0

    def _pass(self, *, with_sweep: bool) -> PassSurvey:
        now = self._counts[0]
        sums = (int(now[f"pass_{what}"] + with_sweep * now[f"sweep_{what}"]) for what in _SUMS)
        return PassSurvey(len(self._passes) + 1, int(now["pass_offset"]), *sums)

    def passes(self) -> tuple[PassSurvey, ...]:
        """The passes so far."""
        return () if self._counts[0]["pass_offset"] < 0 else (*self._passes, self._pass(with_sweep=True))

    def blocks(self) -> tuple[RamBlockSurvey, ...]:
        """The blocks, and what has come of them so far."""
        return tuple(self._survey(block) for block in self._blocks.values())

    def _survey(self, block: _Block) -> RamBlockSurvey:
        times, counted = block.pages["times"], block.counts[0]
        sent = int(np.count_nonzero(times))
        return RamBlockSurvey(
            block.name,
            block.size,
            block.pages.size,
            int(counted["normal"]),
            int(counted["zero"]),
            int(counted["changed"]),
            sent,
            int(np.count_nonzero(times > 1)),
            int(times.max(initial=0)),
            int((times == 0).argmax()) if sent < times.size else None,
        )


def _refused(reader: StreamReader, flags: int) -> StreamError:
    # One bit that is wrong makes none of these of another record.
    if flags & ~RamFlag.CONTINUE in _ENCODINGS:
        return StreamUnsupported(explain_flags(flags), reader.section, reader.offset)
    return reader.error(explain_flags(flags))


def explain_flags(flags: int) -> str:
    """Why no record with these flags can be read."""
    if flags & ~int(sum(RamFlag)):
        return f"a record of guest RAM belongs here; no record has the flags {flags:#x}"
    for flag, text in _ENCODINGS.items():
        if flags & flag:
            return text
    names = RamFlag(flags & int(_SUPPORTED | RamFlag.MEM_SIZE)).name
    return f"a record of guest RAM belongs here; none has the flags {flags:#x} ({names or 'none'}) together"


def missing(blocks: Sequence[RamBlockSurvey]) -> RamBlockSurvey | None:
    """The first block of which a page never came."""
    return next((block for block in blocks if block.first_missing is not None), None)


_SUMS = ("normal", "zero", "changed", "bytes")
_NO_COUNTS: BlockCounts = np.zeros(1, dtype=counts.BLOCK_COUNTS)
_NO_PAGES: PageCounts = np.zeros(0, dtype=counts.PAGE_COUNTS)
_NO_DIGESTS: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
_NO_RAM: Bytes = np.zeros(0, dtype=np.uint8)
_NOT_HELD: Words = np.zeros(0, dtype=np.uint64)
