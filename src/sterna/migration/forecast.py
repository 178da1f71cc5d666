"""What stopping the guest now would cost, from what this migration has measured so far.

Every part of the downtime is predicted apart (`DowntimeParts`), so that a wrong prediction tells which part it was:

- *last pass*: a sync of the dirty log takes as long as the last one; each page the processor's time to encode, and the least
  that it has taken lately, since the guest then leaves its own processors and caches; each byte its time to be handed over,
  pacing left out, since the limit does not hold then; or what the link needs for the bytes, if that is longer.
- *digest* and *destination load*: what remains of the digests of both ends beyond that, and the way through the destination.
  It may need longer for a page than the way there does: as long as it was waited for after the passes before.
- the rest takes what it takes on a host with nothing else to do.
"""

import math
from dataclasses import dataclass, field

from sterna.memory.address import PAGE_SIZE
from sterna.migration.policy import LAST_PASS_MS
from sterna.migration.statistics import DowntimeParts
from sterna.migration.transport.sender import Sent

STOP_MS = 0.2
DEVICE_STATE_MS = 6.0
DIGEST_MS = 1.5
ANSWER_MS = 3.0
LOAD_MS = 8.0
START_MS = 0.5
"""Measured with guests of one and two CPUs: the vCPUs' stop; devices saved; a digest of which all but a little was there; the
answer to a greeting made up; devices loaded; the start. Medians, as LAST_PASS_MS is, of demonstrations on a host at rest; of
the answer somewhat less, so that a short way counts for something.
"""

_WORD = 8
_KEPT = 0.3
"""How much the passes before the last weigh together, of 1."""
_BUSY_SECONDS = 0.01
_BUSY_BYTES = 64 << 10
"""When fewer bytes wait, and for long, the destination has no processor: that tells nothing of the link's speed."""
_SAMPLES = 16
_BATCH_PAGES = 256
"""A batch with fewer pages tells nothing of what a page takes."""
_RECENT_PASSES = 4
_BATCHES_PER_OUTLIER = 16
"""Of so many batches the cheapest one is left out."""


@dataclass
class LinkMeter:
    """How fast the link is, from how what waits in the socket goes away; None while it has never been the limit.

    It had something to carry all the time between two looks if the later finds bytes waiting that were already waiting at the
    earlier, or if the socket was full in between. That something waits each time tells nothing: small pieces on a fast link
    wait for a moment each.
    """

    bytes_per_second: float | None = None
    _since: tuple[float, int] | None = None
    _handed_bytes: int = 0
    _waited_seconds: float = 0.0
    _samples: list[float] = field(default_factory=list)

    def observe(self, now: float, handed_bytes: int, unsent_bytes: int, waited_seconds: float) -> None:
        """Look at what waits.

        :param handed_bytes: handed to the kernel so far
        :param unsent_bytes: of them those that have not arrived
        :param waited_seconds: how long it had no room for more, in all
        """
        arrived = handed_bytes - unsent_bytes
        busy = arrived < self._handed_bytes or waited_seconds > self._waited_seconds
        self._handed_bytes, self._waited_seconds = handed_bytes, waited_seconds
        if not unsent_bytes:
            self._since = None
            return
        if self._since is None or not busy:
            self._since = (now, arrived)
            return
        seconds, size = now - self._since[0], arrived - self._since[1]
        if seconds >= _BUSY_SECONDS and size >= _BUSY_BYTES:
            self._since = (now, arrived)
            self._samples = [*self._samples[1 - _SAMPLES :], size / seconds]
            self.bytes_per_second = sorted(self._samples)[len(self._samples) // 2]


@dataclass
class Forecast:
    """Gathers what one migration's passes cost, and says what the next and the last would.

    :ivar link: where the socket tells how much waits in it
    """

    link: LinkMeter = field(default_factory=LinkMeter)
    round_trip_seconds: float = 0.0
    _encode_per_page: float = 0.0
    _cpu_per_page: list[list[float]] = field(default_factory=lambda: [[]])
    _hand_over_per_byte: float = 0.0
    _drain_per_page: float = 0.0
    _harvest_seconds: float = 0.0
    _drain_seconds: float = 0.0
    _pages: int = 0
    _bytes: int = 0
    _encode_seconds: float = 0.0
    _encode_cpu_seconds: float = 0.0
    _send_seconds: float = 0.0

    def sent(self, sent: Sent) -> None:
        """Pages of the running pass were handed over."""
        pages = sent.pages - sent.zero_pages
        if pages >= _BATCH_PAGES:
            self._cpu_per_page[-1].append(sent.encode_cpu_seconds / pages)
        self._pages += pages
        self._bytes += sent.size
        self._encode_seconds += sent.encode_seconds
        self._encode_cpu_seconds += sent.encode_cpu_seconds
        self._send_seconds += sent.seconds - sent.encode_seconds

    def drained(self, seconds: float, waiting_bytes: int, digest_seconds: float) -> None:
        """The destination has taken in the pass, so long after its last byte was handed over.

        :param waiting_bytes: what had not arrived when the wait began
        :param digest_seconds: what digests of the pass's pages take, which is predicted apart
        """
        link = self.link.bytes_per_second
        transfer = waiting_bytes / link if link else 0.0
        self._drain_seconds = max(0.0, seconds - transfer - digest_seconds - self.round_trip_seconds)
        # The greeting's answer took the destination some time to make up.
        self.round_trip_seconds = min(self.round_trip_seconds, seconds)

    def finish_pass(self, paced_seconds: float, harvest_seconds: float) -> None:
        """The pass and the sync of the dirty log after it are over.

        :param paced_seconds: how long the pass waited for its limit
        """
        send_seconds = max(self._send_seconds - paced_seconds, 0.0)
        if self._pages:
            self._encode_per_page = _mixed(self._encode_per_page, self._encode_seconds / self._pages)
            if not self._cpu_per_page[-1]:
                self._cpu_per_page[-1].append(self._encode_cpu_seconds / self._pages)
            self._cpu_per_page = [*self._cpu_per_page[-_RECENT_PASSES:], []]
            self._drain_per_page = _mixed(self._drain_per_page, self._drain_seconds / self._pages)
        if self._bytes:
            self._hand_over_per_byte = _mixed(self._hand_over_per_byte, send_seconds / self._bytes)
        self._harvest_seconds = harvest_seconds
        self._pages, self._bytes, self._encode_seconds, self._send_seconds = 0, 0, 0.0, 0.0
        self._encode_cpu_seconds = 0.0

    def unpaced_seconds(self, pages: int, size: float, waiting_bytes: int, *, stopped: bool = False) -> float:
        """How long so many pages take when nothing is paced.

        :param waiting_bytes: what is to go before them
        :param stopped: whether the guest stands still, and leaves its processors to the encoder
        """
        per_page = self._undisturbed_cpu_per_page() if stopped else self._encode_per_page
        seconds = pages * per_page + size * self._hand_over_per_byte
        link = self.link.bytes_per_second
        return max(seconds, (size + waiting_bytes) / link) if link else seconds

    def _undisturbed_cpu_per_page(self) -> float:
        costs = sorted(cost for each in self._cpu_per_page for cost in each)
        return costs[len(costs) // _BATCHES_PER_OUTLIER] if costs else 0.0

    def whole_pass_seconds(self, pages: int, limit: int) -> float:
        """How long a pass would take if so many pages were sent whole.

        :param limit: bytes per second, 0 for none
        """
        size = pages * (PAGE_SIZE + _WORD)
        per_byte = max(self._hand_over_per_byte, 1 / (self.link.bytes_per_second or math.inf))
        return max(size * per_byte, size / limit if limit else 0.0) + self._harvest_seconds

    def next_pass_seconds(self, pages: int, size: float, limit: int) -> float:
        """How long a pass of so many pages takes while the guest runs.

        :param limit: bytes per second, 0 for none
        """
        sending = max(self.unpaced_seconds(pages, size, 0), size / limit if limit else 0.0)
        return sending + pages * self._drain_per_page + self._harvest_seconds

    def downtime(
        self, pages: int, size: float, waiting_bytes: int, digest_seconds: float | None, *, commits: bool
    ) -> DowntimeParts:
        """The downtime if the guest stopped now.

        :param digest_seconds: what is left of the digest of RAM takes so long on each end, beside the rest; None where
            digests are not compared
        :param commits: whether the destination starts on COMMIT
        """
        sending = self._harvest_seconds + self.unpaced_seconds(pages, size, waiting_bytes, stopped=True)
        last_pass = LAST_PASS_MS + sending * 1000
        digest_ms = (digest_seconds or 0.0) * 1000
        beside_ms = 0.0 if digest_seconds is None else DIGEST_MS
        round_trip_ms = max(0.0, self.round_trip_seconds * 1000 - ANSWER_MS)
        return DowntimeParts(
            stop=STOP_MS,
            last_pass=last_pass,
            device_state=DEVICE_STATE_MS,
            digest=beside_ms + max(0.0, digest_ms - last_pass - DEVICE_STATE_MS),
            destination_load=LOAD_MS + pages * self._drain_per_page * 1000 + digest_ms + round_trip_ms,
            start=START_MS + round_trip_ms / 2 if commits else 0.0,
        )


def _mixed(before: float, now: float) -> float:
    return now if not before else before * _KEPT + now * (1 - _KEPT)
