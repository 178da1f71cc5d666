"""Passes over dirty memory, with the guest running or stopped: the dirty log is taken, and its pages are sent."""

from collections.abc import Sequence

from sterna.memory.bitmap import DirtyBatch
from sterna.migration.source.context import Link, SourceContext
from sterna.migration.transport.sender import Sent
from sterna.migration.transport.work import PassWork
from sterna.stream.ram.encoder import Batch


class Passes:
    """The passes of one migration.

    :ivar cache: for XBZRLE; None without, and once pages are sent whole
    :ivar written_pieces: of the digest of RAM, how many the last sync of the log has left to be made; 0 without one
    """

    def __init__(self, context: SourceContext, link: Link) -> None:
        self._context, self._link = context, link
        self.cache = link.cache
        self.written_pieces = link.digest.stale_pieces if link.digest is not None else 0

    # -- the dirty log ---------------------------------------------------------------------------------------

    def harvest(self) -> list[DirtyBatch]:
        """Take the dirty log. What it has belongs to the next pass, and so to `merge`."""
        batches, digest = self._context.guest.harvest(), self._link.digest
        if digest is not None:
            for batch in batches:
                digest.touch(batch.block, batch.words)
            self.written_pieces = digest.stale_pieces
        return batches

    def merge(self, work: PassWork, batches: Sequence[DirtyBatch]) -> PassWork:
        """What has not been sent yet, and what a harvest has; each page once.

        :raise LostWriteError: When the migration is audited, and a write is in neither.
        """
        merged = PassWork.merged(work, self._context.guest.ram_blocks, batches)
        self._link.audit.check_harvest(merged, self._context.progress.pass_number)
        return merged

    def sync(self, work: PassWork) -> PassWork:
        """Take the dirty log, and add what it has (QEMU: migration_bitmap_sync)."""
        return self.merge(work, self.harvest())

    # -- sending ---------------------------------------------------------------------------------------------

    def send(self, batch: Batch, *, final: bool) -> Sent:
        """Send pages.

        :param final: whether the guest is stopped
        :raise Cancelled, Refused, ProtocolError, ChannelError: When it is over with the migration.
        """
        context, link = self._context, self._link
        context.cancellation.check()
        link.peer.check()
        number = context.progress.pass_number
        sent = link.pages.send_batch(link.audit.stage(batch), number, final=final)
        context.progress.sent(sent, final=final)
        context.sent_pages.record(batch, number)
        return sent

    def flush(self, *, final: bool) -> Sent:
        """All of the pass has been handed to the kernel on return."""
        sent = self._link.pages.finish_pass(final=final)
        self._context.progress.sent(sent, final=final)
        return sent

    def finish(self, dirty_pages: int) -> None:
        """The pass is over, and leaves so many pages dirty."""
        if self.cache is not None:
            self._context.progress.note(xbzrle=self.cache.finish_pass())
        self._context.progress.finish_pass(dirty_pages)

    def send_whole(self) -> None:
        """From now on no page is sent as what changed in it."""
        self._link.pages.send_whole()
        self.cache = None
