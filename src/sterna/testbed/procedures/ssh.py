"""An ssh session that was opened before a migration goes on after it."""

from sterna.testbed.bed import ScenarioContext
from sterna.testbed.evidence import Evidence
from sterna.testbed.migration import Migration
from sterna.testbed.network import guest_nic
from sterna.testbed.procedures.procedure import BaseProcedure

_ONCE_MORE = 3
_ANSWER_SECONDS = 20.0


class Ssh(BaseProcedure, tag="ssh", frozen=True):
    """From the server a shell in the guest is asked all the time; the guest migrates, and its address is led to its new host."""

    def run(self, context: ScenarioContext, evidence: Evidence) -> None:
        bed = context.bed
        guest = context.guest
        nic = guest_nic()
        bed.kind.check_session()
        source = bed.source(context.vm, nic=nic)
        destination = bed.destination(context.vm, nic=nic)
        bed.network.route_guest(nic.address, source.host)
        bed.warm_up(source, guest)
        destination.ready()
        with bed.kind.session(bed.network.server, nic.address, bed.directory) as session:
            evidence.conversations.append(session.seen)
            bed.say("an ssh session is open; migrate")
            migration = Migration(context, source, destination)
            evidence.passages.append(migration.record)
            migration.run()
            if migration.record.completed:
                bed.network.route_guest(nic.address, destination.host)
                for _ in range(_ONCE_MORE):
                    # One question may have been answered before the guest left.
                    if not session.wait_answers(session.answered + 1, _ANSWER_SECONDS):
                        session.seen.problems.append("it does not answer after the migration")
                        break
                migration.arrive()
