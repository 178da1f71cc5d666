"""The audit of the dirty log: is every write since a page was sent in a harvest, or in the log?

With it pages are sent from a copy, the *shadow*: they are copied from guest RAM, and that copy is what the destination gets. So
the shadow is what has been sent, to the byte. After a harvest, which is the same as ever, the guest is held, the
log peeked at, and RAM compared with the shadow.

Why a page that differs and is excused by nobody is a lost write: it was copied after the harvest that had it was over, so the
write that makes it differ came later than that harvest. A dirty log that keeps its promise has such a write in one of the
harvests that followed, or in the log now. Had an earlier of these had the page, it would have been sent again and be equal. So
the last one has it, or the log does, or it waits to be sent. There is no time at which a sound log has the page nowhere: in the
instant of a harvest it is in its result. While nobody runs, no write is half done.

Why none is missed: what was sent is the shadow, so a page that equals its shadow need not be sent, however it came to. A lost
write is found at the first harvest after it, unless the page is written again before that and logged: then it is sent for that.
"""

import time
from collections.abc import Sequence

from sterna.memory.bitmap import DirtyBatch, Words, count, new_bitmap
from sterna.memory.shadow import Shadow
from sterna.migration.errors import LostWriteError
from sterna.migration.guest import MigratableGuest
from sterna.migration.lostwrites import SHOWN, AuditReport, LostWrite
from sterna.migration.progress import Progress
from sterna.migration.transport.work import PassWork, SentPages
from sterna.stream.ram.encoder import Batch


class Audit:
    """The hooks of an audit: the passes of a migration call them. Here they do nothing."""

    def stage(self, batch: Batch) -> Batch:
        """These pages are about to be sent: what is to be sent in their place, from now until the pass is over."""
        return batch

    def check_harvest(self, work: PassWork, number: int) -> None:
        """A harvest has returned.

        :param work: all that is to be sent after it: the harvest, and what was left from before
        :param number: of the pass that it ended
        :raise LostWriteError: When there is a lost write.
        """


class ShadowAudit(Audit):
    """An audit of one migration.

    :param sent_pages: which pass sent each page last
    :raise RamError: When the host refuses the memory, as much as the guest has, or has too little left.
    """

    def __init__(self, guest: MigratableGuest, progress: Progress, sent_pages: SentPages) -> None:
        self._guest = guest
        self._progress = progress
        self._sent_pages = sent_pages
        self._shadow = Shadow(guest.ram_blocks)
        self._report = AuditReport()
        progress.note(audit=self._report)

    def stage(self, batch: Batch) -> Batch:
        name = batch.block.name
        if not batch.untouched:  # else it goes as zeros, which the shadow still is
            self._shadow.keep(name, batch.pages)
        return Batch(self._shadow.block(name), batch.pages, batch.untouched)

    def check_harvest(self, work: PassWork, number: int) -> None:
        excused = {block.name: new_bitmap(block.pages) for block in self._guest.ram_blocks}
        work.merge_into(excused)
        started = time.monotonic()
        with self._guest.held():
            judged = self._judge(excused, self._guest.peek_dirty_log())
            lost = [(name, page) for name, words in judged.items() for page in self._differing(name, words)]
            told = self._explain(lost[:SHOWN], number)
            held_ms = (time.monotonic() - started) * 1000
        before = self._report
        self._report = AuditReport(
            before.harvests + 1,
            before.pages_judged + sum(count(words) for words in judged.values()),
            before.held_ms + held_ms,
            max(before.longest_hold_ms, held_ms),
            len(lost),
            told,
        )
        self._progress.note(audit=self._report)
        if told:
            more = "" if len(lost) == 1 else f" ({len(lost)} such pages)"
            raise LostWriteError(f"a write was lost{more}: {told[0]}")

    def _judge(self, excused: dict[str, Words], log: Sequence[DirtyBatch]) -> dict[str, Words]:
        """Which pages must be as they were sent."""
        for batch in log:
            batch.merge_into(excused[batch.block])
        return {name: self._shadow.judged(name, words) for name, words in excused.items()}

    def _differing(self, name: str, judged: Words) -> list[int]:
        return list(self._shadow.differing(name, judged).tolist())

    def _explain(self, lost: Sequence[tuple[str, int]], number: int) -> tuple[LostWrite, ...]:
        """While the guest is held: its RAM, and where its vCPUs are, stay as they were found."""
        if not lost:
            return ()
        positions = tuple(self._guest.positions())
        found = []
        for name, page in lost:
            slot, address = self._guest.locate(name, page)
            sent = self._sent_pages.pass_of(name, page)
            first, last = self._shadow.difference(name, page)
            found.append(LostWrite(address, name, page, slot, sent, number, first, last, positions))
        return tuple(found)

    def close(self) -> None:
        """Give its memory back."""
        self._shadow.close()
