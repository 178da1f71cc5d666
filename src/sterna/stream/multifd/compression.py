"""Compressed pages in multifd packets.

Each channel has one compressed stream for the whole migration. A packet carries the next piece of it, flushed, so
that the pages can be had from what has come; pieces only make sense one after another.
"""

import sys
import zlib
from collections.abc import Callable
from functools import partial

from sterna.stream.multifd.format import Bytes, Compression
from sterna.stream.wire import StreamError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_ZSTD_WINDOW_LOG = 25
"""Largest window that is accepted, as log2 of bytes: what level 20, the highest of `multifd-zstd-level`, uses."""


Compressor = Callable[[Bytes], bytes]
"""The sending end of a channel's compressed stream: the next piece of it, which holds all of the given bytes. It works without
the GIL.
"""


def compressor(compression: Compression, level: int) -> Compressor:
    """
    :param compression: not NONE
    :param level: 0 to 9 for zlib, 0 to 20 for zstd
    """
    if compression is Compression.ZLIB:
        stream = zlib.compressobj(level)
        return lambda data: stream.compress(data) + stream.flush(zlib.Z_SYNC_FLUSH)
    return partial(zstd.ZstdCompressor(level).compress, mode=zstd.ZstdCompressor.FLUSH_BLOCK)


class Decompressor:
    """The receiving end of a channel's compressed stream. It works without the GIL.

    :param compression: not NONE
    """

    def __init__(self, compression: Compression) -> None:
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        is_zlib = compression is Compression.ZLIB
        self._stream = zlib.decompressobj() if is_zlib else zstd.ZstdDecompressor(options=options)

    def decompress(self, data: Bytes, size: int) -> bytes:
        """
        :param data: the next piece of the stream
        :param size: bytes of the pages that are in it; never much more memory is taken than that
        :return: `size` bytes
        :raise StreamError: When the piece is damaged, or holds more or fewer bytes. The stream is of no use then.
        """
        try:
            pages = self._stream.decompress(data, size + 1)
        except zlib.error as error:
            raise StreamError(f"damaged zlib data: {str(error).rpartition(': ')[2]}") from error
        except (zstd.ZstdError, EOFError) as error:
            raise StreamError(f"damaged zstd data: {error}") from error
        if len(pages) > size:
            raise StreamError(f"compressed pages hold more than the {size} bytes of the packet's pages")
        if len(pages) < size:
            raise StreamError(f"compressed pages hold {len(pages)} bytes instead of {size}")
        if self._stream.eof:
            raise StreamError("a channel's compressed stream ends within the migration")
        return pages
