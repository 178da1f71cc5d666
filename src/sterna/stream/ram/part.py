"""The records of a part, one batch after the other, whoever uses them; and what is wrong with one that is none."""

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from sterna.stream.ram.records import Status, bytes_array, new_rows
from sterna.stream.ram.setup import named_block
from sterna.stream.reader import StreamReader
from sterna.stream.wire import XBZRLE_ENCODING, RamFlag, StreamError
from sterna.stream.xbzrle import coding


class Block(Protocol):
    """A RAM block, of `size` bytes."""

    name: str
    size: int


_Block = TypeVar("_Block", bound=Block)


class Part(Generic[_Block]):
    """Which block the records at hand are of.

    :param blocks: by name; more may be added
    :param page_bits: log2 of the stream's page size
    :param refused: why a record with these flags cannot be read

    :ivar block: None when none has been named yet
    :ivar name: the block's, as `scan` takes it
    :ivar rows: room for what `scan` finds
    """

    def __init__(
        self,
        blocks: Mapping[str, _Block],
        page_bits: int,
        refused: Callable[[StreamReader, int], StreamError],
    ) -> None:
        self._blocks = blocks
        self._page_bits = page_bits
        self._refused = refused
        self.block: _Block | None = None
        self.name = bytes_array(b"")
        self.rows = new_rows()

    def after(self, reader: StreamReader, at: int, status: int) -> bool:
        """Go on after what `scan` found has been used.

        :param at: the position after it
        :param status: why there was no more
        :return: whether the part has ended
        :raise StreamError: When the record at hand cannot be read.
        """
        reader.advance(at)
        if status == Status.MORE:
            reader.fill()
        elif status == Status.BLOCK:
            self.block = named_block(reader, self._blocks)
            self.name = bytes_array(self.block.name.encode())
        elif status != Status.END:
            raise self._explain(reader, Status(status))
        return bool(status == Status.END)

    def _explain(self, reader: StreamReader, status: Status) -> StreamError:
        word = int.from_bytes(reader.peek(8), "big")
        flags = word & ((1 << self._page_bits) - 1)
        match status:
            case Status.OUTSIDE:
                assert self.block is not None
                return reader.error(
                    f"page offset {word - flags:#x} is outside RAM block {self.block.name!r} "
                    f"of {self.block.size:#x} bytes"
                )
            case Status.FILL:
                return reader.error("a record of a zero page is filled with another byte than zero")
            case Status.NO_BLOCK:
                return reader.error("a record continues a RAM block, but none has been named yet")
            case Status.UNSENT | Status.ENCODING | Status.CODE:
                return self._explain_change(reader, status, word - flags, flags)
        return self._refused(reader, flags)

    def _explain_change(self, reader: StreamReader, status: Status, offset: int, flags: int) -> StreamError:
        what = f"the change of the page at {offset:#x}"
        if status == Status.UNSENT:
            return reader.error(f"{what} comes before the page itself")
        head = 8 if flags & RamFlag.CONTINUE else 9 + reader.peek(9)[8]
        encoding, *length = reader.peek(head + 3)[head:]
        size = int.from_bytes(length, "big")
        at = reader.offset + head
        if encoding != XBZRLE_ENCODING:
            return reader.error(f"{what} has the unknown encoding {encoding:#04x}", at)
        if status == Status.ENCODING:
            return reader.error(f"{what} has {size} bytes, more than a page", at + 1)
        code = reader.peek(head + 3 + size)[head + 3 :]
        fault, where = coding.check(bytes_array(code), 1 << self._page_bits)
        return reader.error(f"{what} cannot be applied: {coding.CodeFault(fault).text}", at + 3 + int(where))
