"""Precopy: pass after pass while the guest runs."""

import time
from contextlib import ExitStack

from sterna.memory.address import PAGE_SIZE
from sterna.migration import handshake, outcome_query, policy
from sterna.migration.backoff import Backoff
from sterna.migration.errors import Cancelled, GivenUp
from sterna.migration.forecast import Forecast
from sterna.migration.peer import PeerKind
from sterna.migration.phase import Phase
from sterna.migration.source.context import Link, SourceContext
from sterna.migration.source.passes import Passes
from sterna.migration.source.switchover import SwitchOver
from sterna.migration.statistics import MigrationStatus
from sterna.migration.transport.work import PassWork

_PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.05
"""How long the destination is waited for after a pass, and how often that looks at what else there is."""
_FEW_PAGES = 64
"""A pass of so many is sent in less time than a guest takes from one timer tick to the next."""


class Precopy(Phase):
    """Sends pass after pass until the policy has the guest stopped."""

    def __init__(self, context: SourceContext, link: Link) -> None:
        self._context, self._link = context, link
        self._passes = Passes(context, link)
        self._policy = context.parameters.policy.make(context.parameters)
        self._at_once = PassWork(())
        self._nothing_left = False
        self._forecast = Forecast(round_trip_seconds=link.greeted.round_trip_seconds)
        self._backoff = Backoff()
        self._paced_before = 0.0

    def run(self, stack: ExitStack) -> SwitchOver:
        """
        :raise GivenUp: When the policy says so.
        """
        context, link = self._context, self._link
        self._note_expectations()
        context.progress.set_up()
        context.progress.advance(MigrationStatus.ACTIVE)
        try:
            return SwitchOver(context, link, self._passes, self._send_passes())
        except Cancelled:
            # Later the guest would stand still for it: the destination also goes by the stream's end.
            if handshake.FEATURE_CANCEL in link.greeted.features:
                outcome_query.tell_cancelled(context.uri, context.migration_id.bytes, context.closing)
            raise

    def _note_expectations(self) -> None:
        parameters, link = self._context.parameters, self._link
        commits = link.greeted.kind is PeerKind.STERNA
        least = self._forecast.downtime(0, 0, 0, None if link.digest is None else 0.0, commits=commits)
        self._context.progress.note(
            policy=parameters.policy.name,
            expected_downtime_ms=parameters.seconds("downtime-limit") * 1000,
            least_downtime_ms=least.total,
        )

    def _send_passes(self) -> PassWork:
        """:return: the dirty pages that are to be sent while the guest is stopped"""
        context, digest = self._context, self._link.digest
        work = PassWork.everything(context.guest.ram_blocks)
        while True:
            started = time.monotonic()
            self._send(work)
            if digest is not None:
                digest.catch_up_after(time.monotonic() - started)
            started = time.monotonic()
            batches = self._passes.harvest()
            harvest_seconds = time.monotonic() - started
            work = self._passes.merge(self._at_once, batches)
            self._finish_pass(work, harvest_seconds)
            context.cancellation.check()
            match self._decide(work):
                case policy.SwitchOver():
                    context.progress.note(verdict="")
                    return work
                case policy.GiveUp(reason):
                    raise GivenUp(reason)
                case policy.Continue(throttle, verdict, encode):
                    if context.logging.throttle(throttle):
                        context.progress.note(throttle_percent=throttle)
                    context.progress.note(verdict=verdict)
                    if not encode and not context.parameters.has("xbzrle"):
                        self._passes.send_whole()
            work = self._back_off(work)

    def _decide(self, work: PassWork) -> policy.Decision:
        state = self._convergence_state(work)
        if self._nothing_left and work.pages <= _FEW_PAGES and not self._link.pages.unsent_bytes():
            return policy.SwitchOver()  # which fits every limit, 0 too
        return self._policy.after_pass(state)

    def _back_off(self, work: PassWork) -> PassWork:
        """Wait, where passes are short. What is written meanwhile goes with the next pass: it is no longer for the wait, and
        finds no more at its end.
        """
        progress = self._context.progress
        wait = self._backoff.after_pass(progress.passes[-1].seconds)
        if not wait:
            return work
        self._context.cancellation.sleep(wait)
        work = self._passes.sync(work)
        progress.synced(work.pages)
        return work

    # -- a pass ----------------------------------------------------------------------------------------------

    def _send(self, work: PassWork) -> None:
        few = work.pages <= _FEW_PAGES
        self._context.progress.begin_pass(work.pages)
        for batch in work.batches():
            self._forecast.sent(self._passes.send(batch, final=False))
            self._check_policy(work)
        self._forecast.sent(self._passes.flush(final=False))
        self._sync_at_once(few)
        if self._link.greeted.kind is not PeerKind.SILENT:
            self._await_destination(work)

    def _sync_at_once(self, few: bool) -> None:
        """After a pass of a few pages: has the guest written anything while they were sent?

        A guest writes something at each tick of its timer, and a tick nearly always falls into the wait for the destination.
        So what is written during that wait does not count as left.
        """
        self._at_once = PassWork(())
        if few:
            self._at_once = self._passes.sync(self._at_once)
        self._nothing_left = few and not self._at_once.pages

    def _await_destination(self, work: PassWork) -> None:
        """The pass is over when the destination has taken it in: else what is under way, or waits there for memory, would be
        waited for while the guest stands still.

        One that does not answer may wait for more itself, if it took the stream for another than it is: then the next pass
        shows it.
        """
        progress, link = self._context.progress, self._link
        number = progress.pass_number
        waiting, started = link.pages.unsent_bytes(), time.monotonic()
        progress.sent_other(link.peer.ping(number))
        waited = 0.0
        while waited < _PATIENCE_SECONDS and not link.peer.ponged(number, _POLL_SECONDS):
            self._check_policy(work)
            waited = time.monotonic() - started
        digest_seconds = 0.0
        if link.digest is not None:
            digest_seconds = link.digest.cost_seconds(self._passes.written_pieces)
        self._forecast.drained(time.monotonic() - started, waiting, digest_seconds)

    def _check_policy(self, work: PassWork) -> None:
        progress, pages = self._context.progress, self._link.pages
        running = progress.running_pass
        self._forecast.link.observe(
            time.monotonic(), progress.transferred, pages.unsent_bytes(), pages.waited_seconds()
        )
        remaining = running.bytes * work.pages / running.pages if running.pages else 0.0
        rate = progress.bandwidth.bytes_per_second
        pass_progress = policy.PassProgress(running.number, progress.elapsed_seconds, remaining, rate)
        if give_up := self._policy.during_pass(pass_progress):
            raise GivenUp(give_up.reason)

    # -- after a pass ----------------------------------------------------------------------------------------

    def _finish_pass(self, work: PassWork, harvest_seconds: float) -> None:
        waited = self._context.limiter.waited_seconds
        paced, self._paced_before = waited - self._paced_before, waited
        self._forecast.finish_pass(paced, harvest_seconds)
        self._passes.finish(work.pages)

    def _convergence_state(self, work: PassWork) -> policy.ConvergenceState:
        progress, parameters = self._context.progress, self._context.parameters
        digest, cache, rate = self._link.digest, self._passes.cache, self._context.limiter.rate
        size = work.pages * PAGE_SIZE if cache is None else cache.rest_bytes(work)
        predicted = self._forecast.downtime(
            work.pages,
            size,
            self._link.pages.unsent_bytes(),
            None if digest is None else digest.finish_seconds(digest.stale_pieces),
            commits=self._link.greeted.kind is PeerKind.STERNA,
        )
        progress.predict(predicted)
        return policy.ConvergenceState(
            progress.passes,
            size,
            self._forecast.next_pass_seconds(work.pages, size, rate),
            self._forecast.whole_pass_seconds(work.pages, rate),
            progress.bandwidth.bytes_per_second,
            predicted,
            progress.elapsed_seconds,
            policy.Limits(parameters.seconds("downtime-limit"), parameters.most_throttle),
        )
