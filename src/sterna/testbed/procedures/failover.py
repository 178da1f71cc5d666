"""A guest is reached over the network through its migration, and its address moves with it."""

import time
from contextlib import ExitStack
from typing import Literal

from sterna.launch.process import VmProcess
from sterna.testbed.bed import Bed, ScenarioContext
from sterna.testbed.errors import BedError
from sterna.testbed.evidence import Evidence, Reachability
from sterna.testbed.migration import Migration
from sterna.testbed.network import GuestNic, guest_nic
from sterna.testbed.probes import Pinger, Probe, Session
from sterna.testbed.procedures.procedure import BaseProcedure
from sterna.testbed.session import SshSession
from sterna.testbed.settings import Count, Positive

_POLL_SECONDS = 0.002
_REACHED_SECONDS = 60.0
_RUNS_SECONDS = 30.0


class Failover(BaseProcedure, tag="failover", frozen=True):
    """Migrate a guest from host 1 to host 2 while the server pings it and keeps a session with it. As soon as it runs at the
    destination, the router leads its address there.

    :ivar times: migrations, to and fro
    :ivar ping_hz: pings a second
    :ivar answers: how many pings have to be answered before and after each migration
    :ivar session: with the guest's UDP echo, or a shell over ssh
    """

    times: Count = 1
    ping_hz: Positive = 100.0
    answers: Count = 100
    session: Literal["udp", "ssh"] = "udp"

    def run(self, context: ScenarioContext, evidence: Evidence) -> None:
        bed = context.bed
        if self.session == "ssh":
            bed.kind.check_session()
        nic = guest_nic()
        guest = context.guest
        source = bed.source(context.vm, nic=nic)
        bed.network.route_guest(nic.address, source.host)
        bed.warm_up(source, guest)
        reached = Reachability("guest", nic.address)
        evidence.reachability.append(reached)
        with ExitStack() as opened:
            pinger = opened.enter_context(Pinger(bed.network.server, nic.address, bed.now, self.ping_hz))
            reached.pings = pinger.pings
            session = self._talk(bed, evidence, reached)
            opened.callback(session.close)
            _await_answers(pinger, self.answers)
            _await_answers(session, 1)
            for number in range(1, self.times + 1):
                bed.say(
                    f"migration {number} of {self.times}, from {source.host.name}, with {nic.address} pinged"
                )
                destination = self._migrate(context, source, nic, evidence, reached)
                if destination is None:
                    return
                _await_answers(pinger, pinger.answered + self.answers)
                # One may have been on its way.
                _await_answers(session, session.answered + 2)
                source.close()
                source = destination
        record = reached.passages[-1]
        reached.answered_by_guest = dict(guest.answered(guest.mark(source)))
        record.pages_checked, record.content = guest.check(source)

    def _talk(self, bed: Bed, evidence: Evidence, reached: Reachability) -> Session | SshSession:
        """Open the session; what is seen of it goes into the evidence."""
        if self.session == "ssh":
            shell = bed.kind.session(bed.network.server, reached.address, bed.directory)
            evidence.conversations.append(shell.seen)
            return shell
        session = Session(bed.network.server, reached.address, bed.now)
        reached.session = session.exchanges
        return session

    def _migrate(
        self,
        context: ScenarioContext,
        source: VmProcess,
        nic: GuestNic,
        evidence: Evidence,
        reached: Reachability,
    ) -> VmProcess | None:
        """Migrate once, with the guest's address; the destination, or None when it did not complete."""
        bed = context.bed
        destination = bed.destination(context.vm, bed.other(source.host), nic=nic)
        destination.ready()
        migration = Migration(context, source, destination)
        record = migration.record
        evidence.passages.append(record)
        reached.passages.append(record)

        def follow() -> bool:
            """Lead its address to the destination once it runs there; whether it does."""
            if not destination.runs():
                return False
            bed.network.route_guest(nic.address, destination.host)
            reached.switched.append(bed.now())
            return True

        migration.start()
        over = switched = False
        while not over:
            over = migration.poll()
            switched = switched or follow()
            time.sleep(_POLL_SECONDS)
        if not record.completed:
            return None
        if not switched:
            bed.wait(follow, _RUNS_SECONDS, "the guest does not run at the destination", _POLL_SECONDS)
        migration.arrive(check=False)
        return destination


def _await_answers(probe: Probe | SshSession, count: int) -> None:
    if not probe.wait_answers(count, _REACHED_SECONDS):
        raise BedError(
            f"the guest does not answer: {probe.answered} of {count} answers in {_REACHED_SECONDS:g} s"
        )
