"""What all phases of an incoming migration have."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sterna.memory.address import PAGE_SIZE
from sterna.memory.rollingdigest import RollingDigest
from sterna.migration import handshake
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.streamsource import ChannelSource
from sterna.migration.destination.multifd.pending import PendingChannels
from sterna.migration.destination.multifd.receiver import MultifdReceiver
from sterna.migration.destination.unmatched import UnmatchedParts
from sterna.migration.guest import MigratableGuest
from sterna.migration.handshake import Hello, Nack, PrivateMessage, Ready, Running
from sterna.migration.outcome_query import OutcomeRecord
from sterna.migration.parameters import Parameters
from sterna.migration.process import OwnProcess, ProcessWatch
from sterna.migration.progress import Progress
from sterna.stream.reader import StreamReader
from sterna.stream.return_path import ReturnMessage

_LAST_WORDS_SECONDS = 2.0
"""How long a source may not take what it has to hear. The few bytes have room where little else goes that way."""


@dataclass(frozen=True)
class Wait:
    """A wait for a guest: what all attempts to take one in have in common.

    :ivar record: remembers who runs the guest, for a source that loses the connection
    :ivar id: names this wait in the greeting
    :ivar silence_seconds: how long the source may send nothing, or less than a page of guest RAM, before it is given up; None
        for ever
    :ivar pending_channels: where multifd channels arrive; None where there can be but one connection
    """

    guest: MigratableGuest
    parameters: Parameters
    record: OutcomeRecord
    id: uuid.UUID
    cancellation: Cancellation
    silence_seconds: float | None = None
    pending_channels: PendingChannels | None = None


class DestinationContext:
    """One attempt, from the first byte on. All of it is there from the start.

    :param head: bytes of the stream that were read already
    :ivar accepted_ns: CLOCK_MONOTONIC when the channel was there
    :ivar own_id: of an attempt that its source gives no name
    :ivar digest: of RAM, made while the pages come
    :ivar watch: the source's process, when it states one that is on this host; whoever made the attempt closes it
    :ivar started: the guest runs: nothing that fails is a failure of the migration
    :ivar confirmed: the source knows that the guest runs here, or never asks
    """

    def __init__(self, wait: Wait, channel: Channel, head: bytes, progress: Progress) -> None:
        self.wait, self.channel, self.progress = wait, channel, progress
        self.guest, self.parameters, self.record = wait.guest, wait.parameters, wait.record
        self.cancellation = wait.cancellation
        self.accepted_ns = time.monotonic_ns()
        self.own_id = uuid.uuid4().bytes
        count = self.parameters.multifd_channels
        # With multifd the pages come on other channels, and little on this one.
        least_bytes = 1 if count else PAGE_SIZE
        self.reader = StreamReader(ChannelSource(channel, head, wait.silence_seconds, least_bytes))
        self.digest = RollingDigest(self.guest.ram_blocks, zero=True, patient=True)
        self.multifd = MultifdReceiver(count, self.guest.uuid, channel, self.cancellation.check)
        self.unmatched = UnmatchedParts(self.guest, self.parameters.ignored_sections)
        self.process = OwnProcess()
        self.watch: ProcessWatch | None = None
        self.started = False
        self.confirmed = False

    def answer(self, kind: PrivateMessage, payload: Hello | Ready | Nack | Running) -> None:
        """Tell a sterna something."""
        self.channel.send(ReturnMessage(kind, handshake.encode(payload)).encode())

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """What the source has to know is said even when this program is ending, which waits for it for a moment."""
        with Cancellation() as never:
            self.channel.watch(never)
            self.channel.patience_seconds = _LAST_WORDS_SECONDS
            try:
                yield
            finally:
                self.channel.watch(self.cancellation)
