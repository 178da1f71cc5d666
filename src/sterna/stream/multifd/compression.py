"""Compressed pages in multifd packets.

Each channel has one compressed stream for the whole migration. A packet carries the next piece of it, flushed, so
that the pages can be had from what has come; pieces only make sense one after another.
"""

import sys
import zlib
from typing import Protocol

from sterna.stream.multifd.format import Bytes, Compression
from sterna.stream.wire import StreamError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_ZSTD_WINDOW_LOG = 25
"""Largest window that is accepted, as log2 of bytes: what level 20, the highest of `multifd-zstd-level`, uses."""


class Compressor(Protocol):
    """The sending end of a channel's compressed stream. It works without the GIL."""

    def compress(self, data: Bytes) -> bytes:
        """The next piece of the stream, which holds all of `data`."""
        ...


class Decompressor(Protocol):
    """The receiving end of a channel's compressed stream. It works without the GIL."""

    def decompress(self, data: Bytes, size: int) -> bytes:
        """
        :param data: the next piece of the stream
        :param size: bytes of the pages that are in it; never much more memory is taken than that
        :return: `size` bytes
        :raise StreamError: When the piece is damaged, or holds more or fewer bytes. The stream is of no use then.
        """
        ...


class _ZlibCompressor:
    def __init__(self, level: int) -> None:
        self._stream = zlib.compressobj(level)

    def compress(self, data: Bytes) -> bytes:
        return self._stream.compress(data) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class _ZlibDecompressor:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def decompress(self, data: Bytes, size: int) -> bytes:
        try:
            pages = self._stream.decompress(data, size + 1)
        except zlib.error as error:
            reason = str(error).rpartition(": ")[2]
            raise StreamError(f"damaged zlib data: {reason}") from error
        _check_size(len(pages), size, self._stream.eof)
        return pages


class _ZstdCompressor:
    def __init__(self, level: int) -> None:
        self._stream = zstd.ZstdCompressor(level)

    def compress(self, data: Bytes) -> bytes:
        return self._stream.compress(data, zstd.ZstdCompressor.FLUSH_BLOCK)


class _ZstdDecompressor:
    def __init__(self) -> None:
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        self._stream = zstd.ZstdDecompressor(options=options)

    def decompress(self, data: Bytes, size: int) -> bytes:
        try:
            pages = self._stream.decompress(data, size + 1)
        except (zstd.ZstdError, EOFError) as error:
            raise StreamError(f"damaged zstd data: {error}") from error
        _check_size(len(pages), size, self._stream.eof)
        return pages


def _check_size(got: int, size: int, ended: bool) -> None:
    if got > size:
        raise StreamError(f"compressed pages hold more than the {size} bytes of the packet's pages")
    if got < size:
        raise StreamError(f"compressed pages hold {got} bytes instead of {size}")
    if ended:
        raise StreamError("a channel's compressed stream ends within the migration")


def compressor(compression: Compression, level: int) -> Compressor:
    """
    :param compression: not NONE
    :param level: 0 to 9 for zlib, 0 to 20 for zstd
    """
    return _ZlibCompressor(level) if compression is Compression.ZLIB else _ZstdCompressor(level)


def decompressor(compression: Compression) -> Decompressor:
    """
    :param compression: not NONE
    """
    return _ZlibDecompressor() if compression is Compression.ZLIB else _ZstdDecompressor()
