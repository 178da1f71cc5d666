"""How the pages of a pass leave the source: what becomes of each batch, whatever way it goes, and what it cost."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from sterna.migration.transport.ratelimit import RateLimiter
from sterna.stream.ram.encoder import Batch
from sterna.stream.xbzrle.cache import XbzrleCache

_SLOW = 400_000_000
"""Bytes per second: below this a limit leaves time for encoding."""
_SPARE = 0.5
"""So does a link, or a destination, that is waited for this share of the time."""


@dataclass(frozen=True)
class Sent:
    """What became of pages.

    :ivar size: bytes on the wire that were handed to the kernel
    :ivar pages: pages of 4 KiB taken
    :ivar zero_pages: those that went as a mark
    :ivar saved_pages: those that went as what changed, or not at all because nothing did
    :ivar seconds: how long it took, pacing included
    :ivar encode_seconds: how much of it was spent before the first byte left
    :ivar encode_cpu_seconds: the processor's part of that: what it would have been with a processor to itself
    :ivar multifd_bytes: how much of `size` went on multifd channels
    """

    size: int
    pages: int = 0
    zero_pages: int = 0
    saved_pages: int = 0
    seconds: float = 0.0
    encode_seconds: float = 0.0
    encode_cpu_seconds: float = 0.0
    multifd_bytes: int = 0


class Transport(ABC):
    """A way for the ram section to the destination.

    Whatever goes wrong raises `ChannelError`; a cancellation raises `Cancelled`. What is sent is counted in bytes on the main
    channel. Nothing is paced when it is `final`: then the guest is stopped.

    :ivar encodes_first_pass: whether pages of the first pass may go as changes, too
    """

    encodes_first_pass = True

    @abstractmethod
    def send_setup(self, data: bytes) -> int:
        """Send the section's first part, which has no pages but an EOS."""

    @abstractmethod
    def send_end(self) -> int:
        """Send the section's last part. All that was taken is before it."""

    def begin(self, now: float) -> int:
        """A batch follows."""
        return 0

    @abstractmethod
    def send_untouched(self, batch: Batch, *, final: bool) -> int:
        """Send pages that are known to be zero."""

    @abstractmethod
    def send_whole(self, batch: Batch, *, final: bool) -> tuple[int, int]:
        """Send pages whole, or as a mark if they are zero.

        :return: bytes, and pages that were
        """

    @abstractmethod
    def encode(
        self, cache: XbzrleCache, batch: Batch, number: int, *, final: bool
    ) -> tuple[int, int, Callable[[], int]]:
        """Have pages encoded, as they go here.

        :return: pages that are all zero; those that go as what changed, or not at all; and what sends the batch
        """

    def finish_pass(self, *, final: bool) -> int:
        """Everything that was taken has been handed to the kernel on return; what `send_end` is to send does not count."""
        return 0

    def take_apart_bytes(self) -> int:
        """Bytes that went on other channels than the main one since the last call."""
        return 0

    @abstractmethod
    def unsent_bytes(self) -> int:
        """Bytes that were handed to the kernel and are known not to have arrived yet."""

    @abstractmethod
    def waited_seconds(self) -> float:
        """How long the kernel had no room for more, in all."""

    def close(self) -> None:
        """Let go of channels of its own."""
        return


class PageSender:
    """Sends pages as zeros, as what changed in them, or whole. One thread calls it.

    :param cache: for XBZRLE, None without
    """

    def __init__(self, transport: Transport, limiter: RateLimiter, cache: XbzrleCache | None) -> None:
        self._transport = transport
        self._limiter = limiter
        self._cache = cache
        self._seconds = 0.0
        self.unsent_bytes = transport.unsent_bytes
        self.waited_seconds = transport.waited_seconds
        self.close = transport.close

    def send_setup(self, data: bytes) -> Sent:
        """Send the section's first part."""
        return self._sent(Sent(self._transport.send_setup(data)))

    def send_end(self) -> Sent:
        """Send its last part."""
        return self._sent(Sent(self._transport.send_end()))

    def send_batch(self, batch: Batch, number: int, *, final: bool) -> Sent:
        """Send pages. They are read at some time between the call and the end of the pass.

        :param number: of the pass
        :param final: whether the guest is stopped; then nothing is paced
        """
        transport = self._transport
        started = encoded_at = time.monotonic()
        cpu, encode_cpu = time.thread_time(), 0.0
        pages, saved = int(batch.pages.size), 0
        size = transport.begin(started)
        if batch.untouched:
            size, zero = size + transport.send_untouched(batch, final=final), pages
        elif self._cache is not None and (number > 1 or self._is_worth_encoding(self._cache, batch)):
            zero, saved, send = transport.encode(self._cache, batch, number, final=final)
            encoded_at, encode_cpu = time.monotonic(), time.thread_time() - cpu
            size += send()
        else:
            sent, zero = transport.send_whole(batch, final=final)
            size += sent
        now = time.monotonic()
        self._seconds += now - started
        return self._sent(Sent(size, pages, zero, saved, now - started, encoded_at - started, encode_cpu))

    def finish_pass(self, *, final: bool) -> Sent:
        """Everything that was taken has been handed to the kernel on return."""
        started = time.monotonic()
        size = self._transport.finish_pass(final=final)
        return self._sent(Sent(size, seconds=time.monotonic() - started))

    def send_whole(self) -> None:
        """From now on no page is sent as what changed in it."""
        self._cache = None

    def _sent(self, sent: Sent) -> Sent:
        apart = self._transport.take_apart_bytes()
        return replace(sent, size=sent.size + apart, multifd_bytes=apart)

    def _is_worth_encoding(self, cache: XbzrleCache, batch: Batch) -> bool:
        """Whether pages of the first pass are: there is time for it, or they become much smaller."""
        if not (cache.from_start and self._transport.encodes_first_pass):
            return False
        waited = self._limiter.waited_seconds + self._transport.waited_seconds()
        spare = 0 < self._limiter.rate < _SLOW or waited > self._seconds * _SPARE
        return spare or cache.looks_sparse(batch)
