"""One multifd channel of a source: a connection, and a thread that sends packets on it."""

import itertools
import threading

import numpy as np

from sterna.host.printable import describe
from sterna.memory.vectors import vectors_of
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel
from sterna.migration.errors import ChannelError, MigrationError
from sterna.migration.transport.multifd.jobs import Group, Job, Jobs, Task
from sterna.migration.transport.ratelimit import RateLimiter
from sterna.migration.transport.records import send_paced
from sterna.stream.multifd.compression import Compressor
from sterna.stream.multifd.format import Compression, Packet, PacketFormat
from sterna.stream.ram.records import bytes_at


class SendChannel:
    """
    :param index: number of the channel
    :param numbers: of packets, shared by all channels
    :param compressor: None where no `Group` comes
    """

    def __init__(
        self,
        index: int,
        channel: Channel,
        jobs: Jobs,
        packet_format: PacketFormat,
        numbers: "itertools.count[int]",
        compression: Compression,
        compressor: Compressor | None,
        limiter: RateLimiter,
        cancellation: Cancellation,
    ) -> None:
        self.channel = channel
        self._index = index
        self._jobs = jobs
        self._format = packet_format
        self._numbers = numbers
        self._compression = compression
        self._compressor = compressor
        self._limiter = limiter
        self._cancellation = cancellation
        self._thread = threading.Thread(target=self._run, name="multifd-send", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Wait for the thread, which has been told to end, and close the connection."""
        if self._thread.ident is not None:
            self._thread.join()
        self.channel.close()

    def check_open(self) -> None:
        """The destination never sends anything here.

        :raise ChannelError: When it has closed the connection, or talks.
        """
        got = self.channel.readinto_now(bytearray(1))
        if got is not None:
            raise ChannelError(f"{self.channel.peer} {'sent something' if got else 'closed the connection'}")

    def _run(self) -> None:
        try:
            while (task := self._jobs.take(self._index)) is not Task.END:
                self._jobs.done(self._send_sync() if task is Task.SYNC else self._send(task))
        except MigrationError as error:
            self._give_up(error)
        except Exception as error:
            self._give_up(ChannelError(f"{self.channel.peer}: {describe(error)}"))

    def _give_up(self, error: MigrationError) -> None:
        if isinstance(error, ChannelError):
            # Whoever waits on another channel learns why.
            self._cancellation.fail(error)
        self._jobs.fail(error)

    def _send_sync(self) -> int:
        header = self._format.encode(Packet(sync=True, number=next(self._numbers)))
        self.channel.send(header)
        return len(header)

    def _send(self, job: Job) -> int:
        if isinstance(job, Group):
            header, data = self._compressed(job)
            vectors = np.concatenate((vectors_of(header), vectors_of(data)))
        else:
            vectors = job.vectors
        return send_paced(self.channel, vectors, self._limiter, final=job.final)

    def _compressed(self, group: Group) -> tuple[bytes, bytes]:
        """A packet's header and data."""
        assert self._compressor is not None
        # A copy: the guest may be writing to the pages, and not every compressor can stand that.
        pages = b"".join(bytes_at(address, size) for address, size in group.vectors.tolist())
        data = self._compressor(pages)
        packet = Packet(
            compression=self._compression,
            block=group.block.name,
            pages=group.pages,
            data_bytes=len(data),
            number=group.number,
        )
        return self._format.encode(packet), data
