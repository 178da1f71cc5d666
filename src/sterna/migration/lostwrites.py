"""What an audit of the dirty log found (`sterna.migration.audit`), as data."""

from dataclasses import dataclass
from typing import Any

SHOWN = 16
"""Lost writes that are told one by one."""


@dataclass(frozen=True)
class LostWrite:
    """A page that was written after it was sent, and that nobody would have sent again for it.

    :ivar address: guest physical address of the page
    :ivar block: its RAM block
    :ivar page: its number in the block
    :ivar slot: the memory slot that has it
    :ivar sent_in_pass: the pass that sent it last
    :ivar found_after_pass: the pass whose harvest has it not
    :ivar first_byte: of those that differ from what was sent, counted from the page's start
    :ivar last_byte: the last of them
    :ivar positions: program counter of each vCPU when it was found
    """

    address: int
    block: str
    page: int
    slot: int
    sent_in_pass: int
    found_after_pass: int
    first_byte: int
    last_byte: int
    positions: tuple[int, ...]

    def __str__(self) -> str:
        where = ", ".join(f"{position:#x}" for position in self.positions)
        return (
            f"page {self.address:#x} ({self.block} page {self.page}, slot {self.slot}) differs from what pass "
            f"{self.sent_in_pass} sent in bytes {self.first_byte:#x} to {self.last_byte:#x}, and neither the harvest after "
            f"pass {self.found_after_pass} nor the log since has it; vCPUs at {where}"
        )

    def to_qmp(self) -> dict[str, Any]:
        return {name.replace("_", "-"): value for name, value in vars(self).items()} | {
            "positions": list(self.positions)
        }


@dataclass(frozen=True)
class AuditReport:
    """An audit so far.

    :ivar harvests: that were audited
    :ivar pages_judged: pages compared, over all of them
    :ivar held_ms: how long the guest stood still for it while it should have run, in all
    :ivar longest_hold_ms: the longest of these times
    :ivar lost_pages: how many pages were found with lost writes
    :ivar lost: the first of them
    """

    harvests: int = 0
    pages_judged: int = 0
    held_ms: float = 0.0
    longest_hold_ms: float = 0.0
    lost_pages: int = 0
    lost: tuple[LostWrite, ...] = ()

    def to_qmp(self) -> dict[str, Any]:
        return {
            "harvests": self.harvests,
            "pages-judged": self.pages_judged,
            "held-ms": round(self.held_ms, 3),
            "longest-hold-ms": round(self.longest_hold_ms, 3),
            "lost-pages": self.lost_pages,
            "lost": [lost.to_qmp() for lost in self.lost],
        }
