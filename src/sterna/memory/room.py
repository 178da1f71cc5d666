"""Memory beside guest RAM: whether there is enough, before it is taken page by page and the process killed for it."""

from collections.abc import Sequence

import numpy as np

from sterna.host.limits import available_bytes
from sterna.memory.address import PAGE_SIZE
from sterna.memory.populated import populated
from sterna.memory.ram import RamBlock, RamError


def spare_bytes(blocks: Sequence[RamBlock]) -> int | None:
    """What this process may still take when the guest has touched all of its RAM; None when the host does not tell.

    :param blocks: all of guest RAM
    """
    available = available_bytes()
    if available is None:
        return None
    touched = sum(int(np.count_nonzero(populated(block, 0, block.pages, 1))) for block in blocks)
    return max(0, available - (sum(block.size for block in blocks) - touched * PAGE_SIZE))


def require_room(what: str, size: int, blocks: Sequence[RamBlock]) -> None:
    """Refuse what may take so much memory, when that is more than `spare_bytes`.

    :param what: that which takes it
    :param blocks: all of guest RAM; none where the guest may do with less
    :raise RamError: When there is too little.
    """
    spare = spare_bytes(blocks)
    if spare is not None and size > spare:
        raise RamError(
            f"{what} may take {size / (1 << 20):.1f} MiB of memory, and only {spare / (1 << 20):.1f} MiB are left here"
            + (", beside all of the guest's own" if blocks else "")
        )
