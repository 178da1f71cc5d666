"""Three clocks on one blackout."""

from typing import ClassVar, Literal

from sterna.testbed.checks.finding import BaseCheck, Finding
from sterna.testbed.evidence import Evidence
from sterna.testbed.settings import Milliseconds


class ClocksCheck(BaseCheck, tag="clocks", frozen=True):
    """The guest's counter, the VMM's report and an observer outside agree on how long the guest stood still.

    :ivar slack_ms: how far two of them may be apart, beyond the observer's resolution and what this machine keeps a guest
        waiting anyway
    :ivar counter: whether the VM lets the guest's counter go on while the guest stands still; when it stops, as QEMU's does,
        the guest is to see no gap
    """

    slack_ms: Milliseconds = 50.0
    counter: Literal["goes-on", "stops"] = "goes-on"
    timed: ClassVar[bool] = True
    claim: ClassVar[str] = "the guest's cycle counter, the VMM and an outside observer agree on the downtime"

    def judge(self, evidence: Evidence) -> Finding:
        seen = [(record, record.blackout) for record in evidence.passages if record.blackout]
        if not seen:
            return self.skipped("no migration completed")
        problems = []
        worst, figure, values = -1.0, "", {}
        for record, blackout in seen:
            slack = self.slack_ms + record.jitter_ms
            others = [("the guest's counter", blackout.guest, slack)] if self.counter == "goes-on" else []
            if blackout.observer is not None:
                others.append(("the observer", blackout.observer, slack + blackout.resolution))
            for who, saw, allowed in others:
                if abs(saw - blackout.vmm) > allowed:
                    problems.append(
                        f"{record.guest}: {who} saw {saw:.1f} ms, the VMM reports {blackout.vmm:.1f} ms; "
                        f"{allowed:.0f} ms apart is the most"
                    )
            if self.counter == "stops" and blackout.guest > slack:
                problems.append(
                    f"{record.guest}: its counter, which is to stop with it, has gone on for {blackout.guest:.1f} ms; "
                    f"{slack:.0f} ms is the most"
                )
            apart = max((abs(saw - blackout.vmm) for _, saw, _ in others), default=0.0)
            if apart > worst:
                worst = apart
                values = {"guest_ms": blackout.guest, "vmm_ms": blackout.vmm, "apart_ms": apart}
                stopped = " (its counter stops with it)" if self.counter == "stops" else ""
                figure = f"guest {blackout.guest:.1f} ms{stopped}, VMM {blackout.vmm:.1f} ms"
                if blackout.observer is not None:
                    figure += f", observer {blackout.observer:.1f} ms (±{blackout.resolution:.1f})"
                    values["observer_ms"] = blackout.observer
                values["jitter_ms"] = record.jitter_ms
                figure += f"; {apart:.1f} ms apart, machine's jitter {record.jitter_ms:.1f} ms"
        return self.found(figure, problems, values)
