"""Multifd at the destination: the channels of one migration, and the barrier that they share with its main channel.

Wherever the main channel has EOS, it waits until each channel has read a SYNC, and each channel that has waits for it. So
nothing that comes later, on whichever channel, is put into RAM before what came earlier. After the last EOS no
channel reads on: RAM is verified, and then the guest's.

Channels may connect before it is known who the source is. They are kept until a sterna has said by which token its channels are
known, and those without it are closed and forgotten. A QEMU says nothing, so each that has connected is taken for one of its
channels.
"""

import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sterna.memory.bitmap import Words
from sterna.memory.ram import RamBlock
from sterna.memory.rollingdigest import Marks
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.destination.multifd.channel import ReceiveChannel
from sterna.migration.errors import ChannelError, Refused
from sterna.stream.multifd.format import CHANNEL_LIMIT, NO_UUID, Init

CONNECT_SECONDS = 10.0
"""How long a channel may take to connect after the main channel needs it."""
_UNKNOWN_LIMIT = CHANNEL_LIMIT + 8
"""Connections that wait for the source to be known; then the oldest goes."""
_POLL_SECONDS = 0.2
"""How often a wait for channels looks at what does not wake it."""


@dataclass(frozen=True)
class Received:
    """What came on multifd channels between two syncs."""

    size: int
    pages: int


class MultifdReceiver:
    """The channels of one attempt to take in a guest.

    :param count: how many channels there must be, 0 while multifd is off
    :param machine_uuid: of this machine, 16 bytes, or None; the source's must be the same
    :param main: the main channel; it stops waiting when one of the others fails
    :param check: raises when the attempt is to end

    :ivar error: why a channel failed, the first that did
    """

    def __init__(
        self, count: int, machine_uuid: bytes | None, main: Channel, check: Callable[[], None]
    ) -> None:
        self.count = count
        self._uuid = machine_uuid or NO_UUID
        self._blocks: Mapping[str, RamBlock] = {}
        self._written: Mapping[str, Marks] = {}
        self._check = check
        self._main = main
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        """Notified when the main channel may have something to see to."""
        self._synced = threading.Condition(lock)
        """Notified when the channels may go on, or are to end: one that waits for the others is not woken by each of them."""
        self._admitted: dict[int, SocketChannel] = {}
        self._channels: dict[int, ReceiveChannel] = {}
        self._arrived: set[int] = set()
        self._page_bits: int | None = None
        self._syncs = 0
        self._over = False
        self._unknown: deque[tuple[Init, SocketChannel]] | None = deque()
        """What has connected while it is not known who the source is."""
        self._token = b""
        self._deaf = False
        self.error: Exception | None = None

    # -- the main channel --------------------------------------------------------------------------------------

    def begin(self, blocks: Sequence[RamBlock], page_bits: int, written: Mapping[str, Marks]) -> None:
        """The source's RAM blocks and the stream's page size are known: channels may be read.

        :param written: as in `RamDecoder`
        """
        with self._changed:
            self._blocks = {block.name: block for block in blocks}
            self._written = written
            self._admit_unknown()
            self._page_bits = page_bits
            for index in self._admitted:
                self._start(index)

    def recognise(self, token: bytes) -> None:
        """The source is a sterna: a channel without its token is somebody else's, and so is each if it has none.

        :param token: empty where the source gives its channels none
        """
        with self._changed:
            self._token = token
            self._deaf = not self.count
            self._admit_unknown()

    def sync(self, silence_seconds: float | None, received: Mapping[str, Words], *, last: bool) -> Received:
        """The main channel has read an EOS: wait until each channel has read SYNC, then let all go on.

        :param silence_seconds: how long a channel that is connected may take, None for ever
        :param received: by block name, pages that have come; those that came on the channels are added
        :param last: whether no pages follow; then the channels are not read any more
        :raise StreamError, ChannelError: What a channel failed with, or when one does not come.
        """
        started = time.monotonic()
        with self._changed:
            self._check_error()
            while len(self._arrived) < self.count:
                self._check()
                self._check_time(time.monotonic() - started, silence_seconds)
                self._changed.wait(_POLL_SECONDS)
                self._check_error()
            size = pages = 0
            for channel in self._channels.values():
                more_bytes, more_pages = channel.take()
                size += more_bytes
                pages += more_pages
                for name, words in channel.received.items() if more_pages else ():
                    received[name][:] |= words
                    words[:] = 0
            self._arrived.clear()
            self._syncs += 1
            self._over = last
            if not last:
                self._synced.notify_all()
            # After the last they wait on for `close`: the guest's start does not wait for so many threads to wake up.
            return Received(size, pages)

    def _check_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _check_time(self, seconds: float, silence_seconds: float | None) -> None:
        missing = sorted(set(range(self.count)) - set(self._channels))
        if missing:
            if self._main.hung_up():
                raise ChannelError(f"{self._main.peer} gave up before multifd channel {missing[0]} connected")
            if seconds >= CONNECT_SECONDS:
                if len(missing) == self.count:
                    raise ChannelError(
                        f"multifd is on here, and no channel connected within {CONNECT_SECONDS:.0f} s: "
                        "is it on at the source?"
                    )
                raise ChannelError(
                    f"multifd channel {missing[0]} did not connect within {CONNECT_SECONDS:.0f} s: "
                    f"{self.count - len(missing)} of {self.count} did"
                )
        elif silence_seconds is not None and seconds >= silence_seconds:
            late = min(set(self._channels) - self._arrived)
            raise ChannelError(f"multifd channel {late} did not go on for {silence_seconds:.1f} s")

    def close(self) -> None:
        """Close all channels; returns when their threads have ended. None is admitted any more."""
        with self._changed:
            self._over = True
            self._admit_unknown()
            admitted, self._admitted = self._admitted, {}
            self._synced.notify_all()
        for channel in admitted.values():
            channel.shut_down()
        for receiving in self._channels.values():
            receiving.join()
        for channel in admitted.values():
            channel.close()

    # -- the listener ------------------------------------------------------------------------------------------

    def admit(self, init: Init, channel: SocketChannel) -> None:
        """A connection says that it is one of the channels. It is closed with the receiver, or at once.

        One that the source has made, and that cannot be one of them, fails the migration, whose pages may have gone there: when
        the main channel comes to its next EOS, by when it can tell the source why.
        """
        with self._changed:
            if self._unknown is None:
                self._admit(init, channel)
                return
            if len(self._unknown) >= _UNKNOWN_LIMIT:
                self._unknown.popleft()[1].close()
            self._unknown.append((init, channel))

    def _admit_unknown(self) -> None:
        """It is known who the source is, or will never be."""
        waiting, self._unknown = self._unknown or (), None
        for init, channel in waiting:
            self._admit(init, channel)

    def _admit(self, init: Init, channel: SocketChannel) -> None:
        if self._over or self._deaf or (self._token and not secrets.compare_digest(init.token, self._token)):
            channel.close()
            return
        error = self._refusal(init)
        if error is not None:
            channel.close()
            self.error = self.error or error
            self._changed.notify()
            return
        self._admitted[init.id] = channel
        if self._page_bits is not None:
            self._start(init.id)

    def _refusal(self, init: Init) -> Refused | None:
        if not self.count:
            return Refused("multifd is on at the source, but off here")
        if init.uuid != self._uuid:
            # QEMU's words.
            theirs, ours = uuid.UUID(bytes=init.uuid), uuid.UUID(bytes=self._uuid)
            return Refused(
                f"multifd: received uuid '{theirs}' and expected uuid '{ours}' for channel {init.id}"
            )
        if init.id >= self.count:
            return Refused(f"multifd channel {init.id} connected, but multifd-channels is {self.count} here")
        if init.id in self._admitted:
            return Refused(f"multifd channel {init.id} connected twice")
        return None

    # -- the channels ------------------------------------------------------------------------------------------

    def _start(self, index: int) -> None:
        assert self._page_bits is not None
        receiving = ReceiveChannel(
            index, self._admitted[index], self._blocks, self._page_bits, self._written, self
        )
        try:
            receiving.start()
        except RuntimeError as error:  # the operating system has no thread to spare
            self.error = self.error or ChannelError(f"{receiving.channel.peer}: {error}")
            self._changed.notify()
            return
        self._channels[index] = receiving

    def arrive(self, channel: ReceiveChannel) -> bool:
        with self._changed:
            self._arrived.add(channel.index)
            present = self._syncs
            if len(self._arrived) == self.count:
                self._changed.notify()
            self._synced.wait_for(lambda: self._over or self._syncs > present)
            return not self._over

    def leave(self, channel: ReceiveChannel, error: Exception | None) -> None:
        with self._changed:
            if self._over:
                return
            if error is None:
                # Whoever sent its last SYNC is not read any more, so this is no end that follows it.
                error = ChannelError(f"{channel.channel.peer} ended before the migration did")
            self.error = self.error or error
            self._changed.notify()
        self._main.stop_reading()
