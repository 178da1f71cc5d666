"""Where decoders take their bytes from: the live stream, or bytes in memory."""

from typing import Protocol

from sterna.stream.wire import TAKE_LIMIT, StreamError


class ByteSource(Protocol):
    """Bytes in order, with a position that errors can name.

    :ivar section: the section being read, for errors
    :ivar offset: offset in the stream of the next byte
    """

    @property
    def section(self) -> str | None: ...

    @property
    def offset(self) -> int: ...

    def take(self, size: int) -> bytes:
        """The next `size` bytes.

        :raise StreamError: When the stream ends before them, or `size` is beyond what any field may have.
        """
        ...

    def peek(self, size: int) -> bytes:
        """The next `size` bytes without taking them; fewer at the end of the stream."""
        ...


class BytesSource:
    """Bytes in memory as a source.

    :param offset: where in the stream the first byte was
    """

    def __init__(
        self, data: bytes | bytearray | memoryview, section: str | None = None, offset: int = 0
    ) -> None:
        self._data = memoryview(data).cast("B")
        self._at = 0
        self._base = offset
        self.section = section

    @property
    def offset(self) -> int:
        return self._base + self._at

    @property
    def left(self) -> int:
        """Number of bytes not taken yet."""
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        if size > TAKE_LIMIT:
            raise self.error(f"{size} bytes asked for, the limit is {TAKE_LIMIT}")
        if size > self.left:
            end = self._base + len(self._data)
            raise StreamError(f"cut short: {size} bytes expected, {self.left} left", self.section, end)
        piece = self._data[self._at : self._at + size]
        self._at += size
        return bytes(piece)

    def error(self, message: str) -> StreamError:
        """An error at the current position."""
        return StreamError(message, self.section, self.offset)

    def peek(self, size: int) -> bytes:
        return bytes(self._data[self._at : self._at + size])
