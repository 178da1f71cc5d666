"""The destination of a migration: one attempt to take in a guest from one channel.

RAM goes into place as it arrives. Devices are decoded as they arrive and loaded only when the whole stream is
there, RAM is complete, and the digests, where there are any, agree. A guest is started on COMMIT between two
sternas, and otherwise at the end of the stream. After any failure the guest's RAM is as if nothing had come.
"""

import logging

import msgspec

from sterna.host.printable import describe
from sterna.migration.destination.context import DestinationContext
from sterna.migration.destination.greeting import Greeting
from sterna.migration.destination.load import RamMismatch
from sterna.migration.destination.setup import SetUp
from sterna.migration.errors import Cancelled, ChannelError
from sterna.migration.handshake import (
    Nack,
    PrivateMessage,
)
from sterna.migration.phase import run_phases
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import AttemptOutcome, OwnershipState
from sterna.stream.return_path import shut
from sterna.stream.wire import StreamCut

log = logging.getLogger(__name__)


class Destination:
    """One attempt. `run` does all of it on the caller's thread."""

    def __init__(self, context: DestinationContext) -> None:
        self._context = context
        self._greeting = Greeting(context)

    @property
    def _is_here(self) -> bool:
        """The RAM is the guest's from now on, whatever fails: its source has given it up, or may have."""
        return self._context.guest.ownership.state is not OwnershipState.ABSENT

    def run(self) -> None:
        """Take in the guest and start it; the outcome is in the progress."""
        context = self._context
        try:
            run_phases(SetUp(context, self._greeting), [])
        except Exception as error:
            if context.started:
                log.exception("after the guest was started")
            elif self._is_here:
                self._keep(error)
            else:
                # Why a channel failed is also why the main channel then ended.
                self._give_up(self._greeting.configuration_error or context.multifd.error or error)
        finally:
            self._end()

    def _end(self) -> None:
        context = self._context
        pending_channels = context.wait.pending_channels
        for end in (
            *(() if pending_channels is None else (pending_channels.shut,)),
            context.digest.close,
            context.multifd.close,
            context.unmatched.close,
            context.process.close,
        ):
            try:
                end()
            except Exception:
                log.exception("at the end of an attempt")

    # -- outcomes --------------------------------------------------------------------------------------------

    def _give_up(self, error: Exception) -> None:
        assert not self._is_here
        context, migration_id = self._context, self._greeting.id
        text = describe(error)
        if context.record.was_cancelled(migration_id):
            text = "the source cancelled the migration"
        elif context.cancellation.is_set:
            text = "it is ending"
        elif isinstance(error, StreamCut):
            text += "; the source gave it up or ended, or the connection broke"
        abandoned = bool(migration_id) and context.record.give_up(migration_id) is AttemptOutcome.ABANDONED
        self._tell(error, text, abandoned=migration_id.hex() if abandoned else "")
        context.multifd.close()
        context.digest.close()
        for block in context.guest.ram_blocks:
            block.discard()
        if context.wait.pending_channels is not None:
            # Who hears of the failure may begin again at once: its channels are the next attempt's.
            context.wait.pending_channels.shut()
        if context.cancellation.is_set:
            context.progress.enter(MigrationStatus.CANCELLED)
        else:
            context.progress.enter(MigrationStatus.FAILED, error=text)

    def _keep(self, error: Exception) -> None:
        """The guest is here, and nobody but its user can start it."""
        context = self._context
        in_doubt = not context.guest.ownership.may_run
        if in_doubt:
            text = (
                f"{describe(error)}, after the source, a QEMU, was told that the guest runs here: it stays paused. Look there: "
                "if the guest does not run there and never will (its state is postmigrate), 'cont -f' (QMP: cont with "
                "x-sterna-force) runs it here; else end this one with 'quit'"
            )
        else:
            text = f"the guest is here, and cannot be started: {describe(error)}; 'cont' tries again"
        context.confirmed = True
        context.guest.leave_in_doubt()
        context.progress.enter(MigrationStatus.FAILED, error=text, in_doubt=in_doubt)

    def _tell(self, error: Exception, text: str, *, abandoned: str) -> None:
        """Tell the source why, if it can be told. One that cannot must not get rid of the rest of its stream: that it cannot
        write is all that it will know.
        """
        context, channel = self._context, self._context.channel
        if not (self._greeting.greeted or self._greeting.return_path):
            return
        try:
            with context.last_words():
                if self._greeting.greeted:
                    nack = error.nack if isinstance(error, RamMismatch) else Nack(text)
                    context.answer(PrivateMessage.NACK, msgspec.structs.replace(nack, abandoned=abandoned))
                else:
                    channel.send(shut(1).encode())
                channel.end_writing()
                # A source that is busy on another channel comes to read why.
                context.multifd.close()
                channel.drain()
        except (ChannelError, Cancelled, MemoryError, OSError):
            pass  # the connection is what failed, or there is no memory or descriptor for talking either
