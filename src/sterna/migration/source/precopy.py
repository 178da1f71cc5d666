"""The passes of one migration: what is sent while the guest runs, and what is left for when it is stopped."""

import time

from sterna.memory.address import PAGE_SIZE
from sterna.memory.bitmap import DirtyBatch, page_numbers
from sterna.migration.backoff import Backoff
from sterna.migration.errors import GivenUp
from sterna.migration.forecast import Forecast
from sterna.migration.pages import PassWork
from sterna.migration.pagesender import Sent
from sterna.migration.peer import PeerKind
from sterna.migration.policy import (
    Continue,
    Decision,
    GiveUp,
    Limits,
    Sending,
    Situation,
    SwitchOver,
)
from sterna.migration.source.context import Link, SourceContext
from sterna.migration.statistics import MigrationStatus

_PATIENCE_SECONDS = 5.0
_LOOK_SECONDS = 0.05
"""How long the destination is waited for after a pass, and how often that looks at what else there is."""
_FEW_PAGES = 64
"""A pass of so many is sent in less time than a guest takes from one timer tick to the next."""


class Precopy:
    """Sends pass after pass until the policy has the guest stopped, and then the last."""

    def __init__(self, context: SourceContext, link: Link) -> None:
        self.context, self.link = context, link
        self._cache = link.cache
        self._policy = context.parameters.policy.make(context.parameters)
        self._at_once = PassWork.dirty(context.guest.ram_blocks, [])
        self._nothing_left = False
        self._forecast = Forecast(round_trip_seconds=link.greeted.round_trip_seconds)
        self._backoff = Backoff()
        self._throttle = 0
        self._paced_before = 0.0
        self._written_pieces = link.digest.stale_pieces if link.digest is not None else 0
        limit_ms = context.parameters.downtime_limit_seconds * 1000
        commits = link.greeted.kind is PeerKind.STERNA
        least = self._forecast.downtime(0, 0, 0, None if link.digest is None else 0.0, commits=commits)
        context.progress.note(
            policy=context.parameters.policy.name,
            expected_downtime_ms=limit_ms,
            least_downtime_ms=least.total,
        )

    def run(self) -> PassWork:
        """Pass after pass while the guest runs.

        :return: the dirty pages that are to be sent while it is stopped
        :raise GivenUp: When the policy says so.
        """
        self.context.progress.set_up()
        self.context.progress.advance(MigrationStatus.ACTIVE)
        work = PassWork.everything(self.context.guest.ram_blocks)
        while True:
            started = time.monotonic()
            self._send(work, final=False)
            if self.link.digest is not None:
                self.link.digest.catch_up_after(time.monotonic() - started)
            started = time.monotonic()
            batches = self._harvest()
            harvest_seconds = time.monotonic() - started
            work = PassWork.merged(self._at_once, self.context.guest.ram_blocks, batches)
            self.link.audit.look(work, self.context.progress.pass_number)
            self._finish_pass(work, harvest_seconds)
            self.context.cancellation.check()
            match self._decide(work):
                case SwitchOver():
                    self.context.progress.note(verdict="")
                    return work
                case GiveUp(reason):
                    raise GivenUp(reason)
                case Continue(throttle, verdict, encode):
                    self._set_throttle(throttle)
                    self.context.progress.note(verdict=verdict)
                    if not encode and not self.context.parameters.xbzrle:
                        self.link.pages.send_whole()
                        self._cache = None
            work = self._back_off(work)

    def _decide(self, work: PassWork) -> Decision:
        situation = self._situation(work)
        if self._nothing_left and work.pages <= _FEW_PAGES and not self.link.pages.unsent_bytes():
            return SwitchOver()  # which fits every limit, 0 too
        return self._policy.after_pass(situation)

    def _back_off(self, work: PassWork) -> PassWork:
        """Wait, where passes are short. What is written meanwhile goes with the next pass: it is no longer for the wait, and
        finds no more at its end.
        """
        wait = self._backoff.after_pass(self.context.progress.passes[-1].seconds)
        if not wait:
            return work
        self.context.cancellation.sleep(wait)
        work = PassWork.merged(work, self.context.guest.ram_blocks, self._harvest())
        self.link.audit.look(work, self.context.progress.pass_number)
        self.context.progress.looked(work.pages)
        return work

    def take_rest(self, rest: PassWork) -> PassWork:
        """The last look at the dirty log: the guest is stopped.

        :param rest: what `run` returned
        """
        rest = PassWork.merged(rest, self.context.guest.ram_blocks, self._harvest())
        self.link.audit.look(rest, self.context.progress.pass_number)
        return rest

    def send_rest(self, rest: PassWork) -> None:
        """The last pass.

        :param rest: what `take_rest` returned
        """
        self._send(rest, final=True)
        self._note_cache()
        self.context.progress.finish_pass(0)

    def release(self) -> None:
        """Let the guest run freely."""
        self._set_throttle(0, tell=False)

    # -- sending ---------------------------------------------------------------------------------------------

    def _send(self, work: PassWork, *, final: bool) -> None:
        few = work.pages <= _FEW_PAGES
        self.context.progress.begin_pass(work.pages)
        number = self.context.progress.pass_number
        for batch in work.batches():
            self.context.cancellation.check()
            self.link.peer.check()
            self._account(
                self.link.pages.send_batch(self.link.audit.stage(batch), number, final=final), final
            )
            self.context.sent_pages.record(batch, number)
            if not final:
                self._look_ahead(work)
        self._account(self.link.pages.finish_pass(final=final), final)
        if not final:
            self._look_at_once(few)
        if not final and self.link.greeted.kind is not PeerKind.SILENT:
            self._await_destination(work)

    def _look_at_once(self, few: bool) -> None:
        """After a pass of a few pages: has the guest written anything while they were sent?

        A guest writes something at each tick of its timer, and a tick nearly always falls into the wait for the destination.
        So what is written during that wait does not count as left.
        """
        self._at_once = PassWork.dirty(self.context.guest.ram_blocks, self._harvest() if few else [])
        self._nothing_left = few and not self._at_once.pages
        if few:
            self.link.audit.look(self._at_once, self.context.progress.pass_number)

    def _await_destination(self, work: PassWork) -> None:
        """The pass is over when the destination has taken it in: else what is under way, or waits there for memory, would be
        waited for while the guest stands still.

        One that does not answer may wait for more itself, if it took the stream for another than it is: then the next pass
        shows it.
        """
        number = self.context.progress.pass_number
        waiting, started = self.link.pages.unsent_bytes(), time.monotonic()
        self.context.progress.sent_other(self.link.peer.ping(number))
        waited = 0.0
        while waited < _PATIENCE_SECONDS and not self.link.peer.ponged(number, _LOOK_SECONDS):
            self._look_ahead(work)
            waited = time.monotonic() - started
        digest = self.link.digest.cost_seconds(self._written_pieces) if self.link.digest is not None else 0.0
        self._forecast.drained(time.monotonic() - started, waiting, digest)

    def _account(self, sent: Sent, final: bool) -> None:
        self.context.progress.sent(
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
        progress, running = self.context.progress, self.context.progress.running_pass
        self._forecast.link.observe(
            time.monotonic(),
            progress.transferred,
            self.link.pages.unsent_bytes(),
            self.link.pages.waited_seconds(),
        )
        remaining = running.bytes * work.pages / running.pages if running.pages else 0.0
        rate = progress.bandwidth.bytes_per_second
        sending = Sending(running.number, progress.elapsed_seconds, remaining, rate)
        if give_up := self._policy.during_pass(sending):
            raise GivenUp(give_up.reason)

    def _harvest(self) -> list[DirtyBatch]:
        batches = self.context.guest.harvest()
        if self.link.digest is not None:
            for batch in batches:
                self.link.digest.touch(batch.block, page_numbers(batch.words))
            self._written_pieces = self.link.digest.stale_pieces
        return batches

    # -- after a pass ----------------------------------------------------------------------------------------

    def _finish_pass(self, work: PassWork, harvest_seconds: float) -> None:
        paced, self._paced_before = (
            self.context.limiter.waited_seconds - self._paced_before,
            self.context.limiter.waited_seconds,
        )
        self._forecast.finish_pass(paced, harvest_seconds)
        self._note_cache()
        self.context.progress.finish_pass(work.pages)

    def _note_cache(self) -> None:
        if self._cache is not None:
            self.context.progress.note(xbzrle=self._cache.finish_pass())

    def _situation(self, work: PassWork) -> Situation:
        size = work.pages * PAGE_SIZE if self._cache is None else self._cache.rest_bytes(work)
        digest = self.link.digest.finish_seconds(self.link.digest.stale_pieces) if self.link.digest else None
        predicted = self._forecast.downtime(
            work.pages,
            size,
            self.link.pages.unsent_bytes(),
            digest,
            commits=self.link.greeted.kind is PeerKind.STERNA,
        )
        self.context.progress.predict(predicted)
        return Situation(
            self.context.progress.passes,
            size,
            self._forecast.next_pass_seconds(work.pages, size, self.context.limiter.rate),
            self._forecast.whole_pass_seconds(work.pages, self.context.limiter.rate),
            self.context.progress.bandwidth.bytes_per_second,
            predicted,
            self.context.progress.elapsed_seconds,
            Limits(self.context.parameters.downtime_limit_seconds, self.context.parameters.most_throttle),
        )

    def _set_throttle(self, percent: int, *, tell: bool = True) -> None:
        if percent != self._throttle:
            self._throttle = percent
            self.context.guest.throttle(percent)
            if tell:
                self.context.progress.note(throttle_percent=percent)
