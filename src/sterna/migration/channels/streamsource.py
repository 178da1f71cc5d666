"""A migration stream's bytes, read from a channel."""

import time

from sterna.migration.channels.channel import Channel
from sterna.migration.errors import ChannelError


class ChannelSource:
    """A `sterna.stream.reader.StreamSource`.

    :param head: what was read of the stream already, to recognise it; the channel has what follows
    :param silence_seconds: how long it may be waited for the next `least_bytes`, None for ever
    """

    def __init__(
        self, channel: Channel, head: bytes, silence_seconds: float | None, least_bytes: int = 1
    ) -> None:
        self._channel = channel
        self._head = head
        self._silence_seconds = silence_seconds
        self._least_bytes = least_bytes
        self._waited = 0.0
        self._bytes = len(head)

    def readinto(self, buffer: memoryview, /) -> int:
        if self._head:
            size = min(len(self._head), len(buffer))
            buffer[:size] = self._head[:size]
            self._head = self._head[size:]
            return size
        try:
            return self._read(buffer)
        except ChannelError as error:
            raise OSError(str(error)) from error

    def _read(self, buffer: memoryview) -> int:
        seconds = self._silence_seconds
        if seconds is None:
            return self._channel.readinto(buffer)
        while (got := self._channel.readinto_now(buffer)) is None:
            started = time.monotonic()
            if self._waited >= seconds or not self._channel.wait_readable(seconds - self._waited):
                sent = f"only {self._bytes} bytes in" if self._bytes else "nothing for"
                raise ChannelError(f"{self._channel.peer} sent {sent} {seconds:.1f} s")
            self._waited += time.monotonic() - started
        self._bytes += got
        if self._bytes >= self._least_bytes:
            self._waited, self._bytes = 0.0, 0
        return got
