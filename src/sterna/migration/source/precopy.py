"""The passes of one migration: what is sent while the guest runs, and what is left for when it is stopped."""

import time
from dataclasses import dataclass, field

from sterna.memory.address import PAGE_SIZE
from sterna.memory.bitmap import DirtyBatch, page_numbers
from sterna.memory.rollingdigest import RollingDigest
from sterna.migration.audit import Audit, NoAudit
from sterna.migration.backoff import Backoff
from sterna.migration.cancellation import Cancellation
from sterna.migration.errors import GivenUp
from sterna.migration.forecast import Forecast
from sterna.migration.guest import Guest
from sterna.migration.pages import PassWork, SentPages
from sterna.migration.pagesender import PageSender, Sent
from sterna.migration.parameters import Parameters
from sterna.migration.peer import Greeted, Peer, PeerKind
from sterna.migration.policy import (
    Continue,
    Decision,
    GiveUp,
    Limits,
    Policy,
    Sending,
    Situation,
    SwitchOver,
)
from sterna.migration.progress import Progress
from sterna.migration.ratelimit import RateLimiter
from sterna.migration.statistics import MigrationStatus
from sterna.migration.xbzrlecache import XbzrleCache

_PATIENCE_SECONDS = 5.0
_LOOK_SECONDS = 0.05
"""How long the destination is waited for after a pass, and how often that looks at what else there is."""
_FEW_PAGES = 64
"""A pass of so many is sent in less time than a guest takes from one timer tick to the next."""


@dataclass
class Precopy:
    """Sends pass after pass until the policy has the guest stopped, and then the last.

    :ivar rolling: digests of RAM, which both ends compare while the guest is stopped; None when they do not
    :ivar sent_pages: what it has sent
    :ivar audit: told of each harvest
    """

    guest: Guest
    pages: PageSender
    peer: Peer
    greeted: Greeted
    parameters: Parameters
    progress: Progress
    limiter: RateLimiter
    cancellation: Cancellation
    sent_pages: SentPages
    rolling: RollingDigest | None = None
    cache: XbzrleCache | None = None
    audit: Audit = field(default_factory=NoAudit)
    _policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        self._policy = self.parameters.policy.make(self.parameters)
        self._at_once = PassWork.dirty(self.guest.ram_blocks, [])
        self._nothing_left = False
        self._forecast = Forecast(round_trip_seconds=self.greeted.round_trip_seconds)
        self._backoff = Backoff()
        self._throttle = 0
        self._paced_before = 0.0
        self._written_pieces = self.rolling.stale_pieces if self.rolling is not None else 0
        limit_ms = self.parameters.downtime_limit_seconds * 1000
        commits = self.greeted.kind is PeerKind.STERNA
        least = self._forecast.downtime(0, 0, 0, None if self.rolling is None else 0.0, commits=commits)
        self.progress.note(
            policy=self.parameters.policy.name,
            expected_downtime_ms=limit_ms,
            least_downtime_ms=least.total,
        )

    def run(self) -> PassWork:
        """Pass after pass while the guest runs.

        :return: the dirty pages that are to be sent while it is stopped
        :raise GivenUp: When the policy says so.
        """
        self.progress.set_up()
        self.progress.advance(MigrationStatus.ACTIVE)
        work = PassWork.everything(self.guest.ram_blocks)
        while True:
            started = time.monotonic()
            self._send(work, final=False)
            if self.rolling is not None:
                self.rolling.catch_up_after(time.monotonic() - started)
            started = time.monotonic()
            batches = self._harvest()
            harvest_seconds = time.monotonic() - started
            work = PassWork.merged(self._at_once, self.guest.ram_blocks, batches)
            self.audit.look(work, self.progress.pass_number)
            self._finish_pass(work, harvest_seconds)
            self.cancellation.check()
            match self._decide(work):
                case SwitchOver():
                    self.progress.note(verdict="")
                    return work
                case GiveUp(reason):
                    raise GivenUp(reason)
                case Continue(throttle, verdict, encode):
                    self._set_throttle(throttle)
                    self.progress.note(verdict=verdict)
                    if not encode and not self.parameters.xbzrle:
                        self.pages.send_whole()
                        self.cache = None
            work = self._back_off(work)

    def _decide(self, work: PassWork) -> Decision:
        situation = self._situation(work)
        if self._nothing_left and work.pages <= _FEW_PAGES and not self.pages.unsent_bytes():
            return SwitchOver()  # which fits every limit, 0 too
        return self._policy.after_pass(situation)

    def _back_off(self, work: PassWork) -> PassWork:
        """Wait, where passes are short. What is written meanwhile goes with the next pass: it is no longer for the wait, and
        finds no more at its end.
        """
        wait = self._backoff.after_pass(self.progress.passes[-1].seconds)
        if not wait:
            return work
        self.cancellation.sleep(wait)
        work = PassWork.merged(work, self.guest.ram_blocks, self._harvest())
        self.audit.look(work, self.progress.pass_number)
        self.progress.looked(work.pages)
        return work

    def take_rest(self, rest: PassWork) -> PassWork:
        """The last look at the dirty log: the guest is stopped.

        :param rest: what `run` returned
        """
        rest = PassWork.merged(rest, self.guest.ram_blocks, self._harvest())
        self.audit.look(rest, self.progress.pass_number)
        return rest

    def send_rest(self, rest: PassWork) -> None:
        """The last pass.

        :param rest: what `take_rest` returned
        """
        self._send(rest, final=True)
        self._note_cache()
        self.progress.finish_pass(0)

    def release(self) -> None:
        """Let the guest run freely."""
        self._set_throttle(0, tell=False)

    # -- sending ---------------------------------------------------------------------------------------------

    def _send(self, work: PassWork, *, final: bool) -> None:
        few = work.pages <= _FEW_PAGES
        self.progress.begin_pass(work.pages)
        number = self.progress.pass_number
        for batch in work.batches():
            self.cancellation.check()
            self.peer.check()
            self._account(self.pages.send_batch(self.audit.stage(batch), number, final=final), final)
            self.sent_pages.record(batch, number)
            if not final:
                self._look_ahead(work)
        self._account(self.pages.finish_pass(final=final), final)
        if not final:
            self._look_at_once(few)
        if not final and self.greeted.kind is not PeerKind.SILENT:
            self._await_destination(work)

    def _look_at_once(self, few: bool) -> None:
        """After a pass of a few pages: has the guest written anything while they were sent?

        A guest writes something at each tick of its timer, and a tick nearly always falls into the wait for the destination.
        So what is written during that wait does not count as left.
        """
        self._at_once = PassWork.dirty(self.guest.ram_blocks, self._harvest() if few else [])
        self._nothing_left = few and not self._at_once.pages
        if few:
            self.audit.look(self._at_once, self.progress.pass_number)

    def _await_destination(self, work: PassWork) -> None:
        """The pass is over when the destination has taken it in: else what is under way, or waits there for memory, would be
        waited for while the guest stands still.

        One that does not answer may wait for more itself, if it took the stream for another than it is: then the next pass
        shows it.
        """
        number = self.progress.pass_number
        waiting, started = self.pages.unsent_bytes(), time.monotonic()
        self.progress.sent_other(self.peer.ping(number))
        waited = 0.0
        while waited < _PATIENCE_SECONDS and not self.peer.ponged(number, _LOOK_SECONDS):
            self._look_ahead(work)
            waited = time.monotonic() - started
        digest = self.rolling.cost_seconds(self._written_pieces) if self.rolling is not None else 0.0
        self._forecast.drained(time.monotonic() - started, waiting, digest)

    def _account(self, sent: Sent, final: bool) -> None:
        self.progress.sent(
            size=sent.size,
            pages=sent.pages,
            zero_pages=sent.zero_pages,
            saved_pages=sent.saved_pages,
            multifd_bytes=sent.multifd_bytes,
            seconds=sent.seconds,
            final=final,
        )
        self._forecast.sent(sent)

    def _look_ahead(self, work: PassWork) -> None:
        progress, running = self.progress, self.progress.running_pass
        self._forecast.link.observe(
            time.monotonic(), progress.transferred, self.pages.unsent_bytes(), self.pages.waited_seconds()
        )
        remaining = running.bytes * work.pages / running.pages if running.pages else 0.0
        rate = progress.bandwidth.bytes_per_second
        sending = Sending(running.number, progress.elapsed_seconds, remaining, rate)
        if give_up := self._policy.during_pass(sending):
            raise GivenUp(give_up.reason)

    def _harvest(self) -> list[DirtyBatch]:
        batches = self.guest.harvest()
        if self.rolling is not None:
            for batch in batches:
                self.rolling.touch(batch.block, page_numbers(batch.words))
            self._written_pieces = self.rolling.stale_pieces
        return batches

    # -- after a pass ----------------------------------------------------------------------------------------

    def _finish_pass(self, work: PassWork, harvest_seconds: float) -> None:
        paced, self._paced_before = (
            self.limiter.waited_seconds - self._paced_before,
            self.limiter.waited_seconds,
        )
        self._forecast.finish_pass(paced, harvest_seconds)
        self._note_cache()
        self.progress.finish_pass(work.pages)

    def _note_cache(self) -> None:
        if self.cache is not None:
            self.progress.note(xbzrle=self.cache.finish_pass())

    def _situation(self, work: PassWork) -> Situation:
        size = work.pages * PAGE_SIZE if self.cache is None else self.cache.rest_bytes(work)
        digest = self.rolling.finish_seconds(self.rolling.stale_pieces) if self.rolling else None
        predicted = self._forecast.downtime(
            work.pages,
            size,
            self.pages.unsent_bytes(),
            digest,
            commits=self.greeted.kind is PeerKind.STERNA,
        )
        self.progress.predict(predicted)
        return Situation(
            self.progress.passes,
            size,
            self._forecast.next_pass_seconds(work.pages, size, self.limiter.rate),
            self._forecast.whole_pass_seconds(work.pages, self.limiter.rate),
            self.progress.bandwidth.bytes_per_second,
            predicted,
            self.progress.elapsed_seconds,
            Limits(self.parameters.downtime_limit_seconds, self.parameters.most_throttle),
        )

    def _set_throttle(self, percent: int, *, tell: bool = True) -> None:
        if percent != self._throttle:
            self._throttle = percent
            self.guest.throttle(percent)
            if tell:
                self.progress.note(throttle_percent=percent)
