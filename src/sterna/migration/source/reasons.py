"""Why a destination does not take the guest, as it says itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from sterna.migration import verify
from sterna.migration.channels.channel import Channel
from sterna.migration.errors import ChannelError, MigrationError, Refused, VerificationError
from sterna.migration.handshake import Nack
from sterna.migration.peer import NackError, Peer
from sterna.migration.source.context import SourceContext


@contextmanager
def in_their_words(context: SourceContext, channel: Channel, peer: Peer) -> Iterator[None]:
    """What fails inside is raised with the reason that the destination gives, where it gives one.

    :raise Refused, VerificationError: In place of the channel's error.
    """
    try:
        yield
    except NackError as error:
        raise _explain(context, error.nack) from error
    except ChannelError as error:
        channel.watch(context.closing)
        reason = peer.explain(error)
        if isinstance(reason, NackError):
            reason = _explain(context, reason.nack)
        raise reason from error


def _explain(context: SourceContext, nack: Nack) -> MigrationError:
    if not nack.block:
        return Refused(f"destination refused: {nack.reason}")
    context.progress.note(verified=False, ram_digest_destination=nack.digest)
    if nack.chunk < 0:
        return VerificationError(f"destination refused: {nack.reason}")
    blocks = context.guest.ram_blocks
    return VerificationError(verify.locate(blocks, nack.block, nack.chunk, nack.pages, context.sent_pages))
