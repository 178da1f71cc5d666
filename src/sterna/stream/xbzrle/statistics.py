"""What XBZRLE saved."""

from dataclasses import dataclass


@dataclass(frozen=True)
class XbzrleStatistics:
    """QEMU's XBZRLECacheStats.

    :ivar cache_size: bytes, as the parameter says
    :ivar bytes: of the records of changed pages, without the word before each; a page that overflowed counts
        as a page
    :ivar pages: pages that were found in the cache: sent as code, whole because the code overflowed, or left
        out because nothing changed
    :ivar cache_miss: pages that were not
    :ivar cache_miss_rate: their share of the last pass's pages
    :ivar encoding_rate: bytes of the pages found in the last pass, over the bytes that they became
    :ivar overflow: pages whose code would have been longer than a page
    """

    cache_size: int
    bytes: int = 0
    pages: int = 0
    cache_miss: int = 0
    cache_miss_rate: float = 0.0
    encoding_rate: float = 0.0
    overflow: int = 0

    def to_qmp(self) -> dict[str, int | float]:
        return {name.replace("_", "-"): value for name, value in vars(self).items()}
