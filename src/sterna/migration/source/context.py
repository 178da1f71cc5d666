"""What all phases of an outgoing migration have."""

import secrets
import uuid
from contextlib import ExitStack
from dataclasses import dataclass

from sterna.memory.rollingdigest import RollingDigest
from sterna.migration.audit import Audit
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.channels.channel import Channel
from sterna.migration.guest import MigratableGuest
from sterna.migration.parameters import Parameters
from sterna.migration.peer import Greeted, Peer
from sterna.migration.process import OwnProcess
from sterna.migration.progress import Progress
from sterna.migration.source.dirtylogging import DirtyLogging
from sterna.migration.source.outcome_query import OutcomeQuery
from sterna.migration.transport.multifd.sender import MultifdSettings
from sterna.migration.transport.ratelimit import RateLimiter
from sterna.migration.transport.sender import PageSender
from sterna.migration.transport.work import SentPages
from sterna.ownership import OwnershipState
from sterna.stream.multifd.format import NO_TOKEN, NO_UUID
from sterna.stream.wire import LEGACY_ARM_PAGE_BITS
from sterna.stream.xbzrle.cache import XbzrleCache


@dataclass
class SourceContext:
    """One outgoing migration, from the command on. All of it is there from the start.

    :ivar closing: set when the program ends; it also ends the question who runs the guest
    :ivar ends: what is closed when the outcome is known, and not before: the guest is seen to first
    :ivar page_bits: log2 of the stream's page size
    :ivar multifd: of the channels, None while multifd is off
    :ivar sent_pages: what was sent so far
    :ivar overdue: the cancellation is the switchover's time limit, and not the user's
    """

    guest: MigratableGuest
    uri: uris.Uri
    parameters: Parameters
    progress: Progress
    closing: Cancellation

    def __post_init__(self) -> None:
        guest, parameters = self.guest, self.parameters
        self.migration_id = uuid.uuid4()
        self.outcome_query = OutcomeQuery(guest.ownership, self.migration_id.bytes, self.uri)
        self.process = OwnProcess()
        self.cancellation = Cancellation()
        self.limiter = RateLimiter(parameters.number("max-bandwidth"), sleep=self.cancellation.sleep)
        self.page_bits = LEGACY_ARM_PAGE_BITS if guest.page_bits is None else guest.page_bits
        self.sent_pages = SentPages(guest.ram_blocks)
        self.multifd: MultifdSettings | None = None
        if parameters.multifd_channels:
            self.multifd = MultifdSettings(
                parameters.multifd_channels,
                parameters.multifd_compression,
                parameters.multifd_level,
                guest.uuid or NO_UUID,
                secrets.token_bytes(len(NO_TOKEN)),
            )
        self.logging = DirtyLogging(guest)
        self.overdue = False
        self.ends = ExitStack()
        self.ends.callback(self.cancellation.close)
        self.ends.callback(self.process.close)
        self.ends.callback(self._stop_watching)
        total = sum(block.size for block in guest.ram_blocks)
        self.progress.note(migration_id=str(self.migration_id), total=total)

    def _stop_watching(self) -> None:
        if self.guest.ownership.state is not OwnershipState.IN_DOUBT:
            self.outcome_query.stop_watching()

    def expire(self) -> None:
        """The guest has been stopped for too long: give the switchover up, as a cancel would."""
        if not self.cancellation.is_set:
            self.overdue = True
            self.cancellation.set()

    def send(self, channel: Channel, data: bytes, *, final: bool = False) -> None:
        """Send something other than pages."""
        channel.send(data)
        self.progress.sent_other(len(data), final=final)


@dataclass(frozen=True)
class Link:
    """The way to the destination, once it is set up.

    :ivar channel: the main one
    :ivar cache: for XBZRLE, None without
    :ivar digest: of RAM, which both ends compare while the guest is stopped; None when they do not
    :ivar audit: told of each harvest
    """

    channel: Channel
    peer: Peer
    greeted: Greeted
    pages: PageSender
    cache: XbzrleCache | None
    digest: RollingDigest | None
    audit: Audit
