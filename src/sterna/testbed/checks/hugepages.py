"""Huge pages dissolve while a migration logs writes, and come back; so does the guest's speed."""

from typing import ClassVar

from sterna.testbed.checks.finding import BaseCheck, Finding
from sterna.testbed.evidence import Evidence
from sterna.testbed.settings import Percent

_NO_COUNT = "this VM does not tell its stage-2 mappings"


class HugePagesCheck(BaseCheck, tag="huge-pages", frozen=True):
    """Huge pages were dissolved during the migration, and are as many as before once the guest has written its pages again."""

    claim: ClassVar[str] = "huge pages are dissolved during a migration and rebuilt after it is cancelled"

    def judge(self, evidence: Evidence) -> Finding:
        before = evidence.blocks_before
        if before is None:
            return self.skipped(_NO_COUNT)
        problems = []
        after = before
        least = min((sample.blocks for sample in evidence.huge_pages), default=before)
        if not before:
            problems.append("the guest had none to begin with")
        elif least >= before:
            problems.append(f"none was dissolved: never fewer than {least}, {before} before")
        for cancelled in evidence.cancelled:
            if cancelled.blocks_after is None:
                continue
            after = min(after, cancelled.blocks_after)
            if cancelled.blocks_after < before:
                problems.append(
                    f"{cancelled.blocks_after} of {before} after the cancel at {cancelled.point:.2f} of RAM"
                )
        figure = f"{before} before, {least} at the least, {after} after; {len(evidence.huge_pages)} looks"
        return self.found(figure, problems, {"before": before, "least": least, "after": after})


class SpeedCheck(BaseCheck, tag="speed", frozen=True):
    """After cancelled migrations the guest works as fast as before, by its writes per second of CPU time.

    :ivar loss_percent: how much slower it may be
    """

    loss_percent: Percent = 5.0
    timed: ClassVar[bool] = True
    claim: ClassVar[str] = "after a cancelled migration the guest is as fast as before"

    def judge(self, evidence: Evidence) -> Finding:
        if len(evidence.speeds) < 2:
            return self.skipped("the guest's speed was not measured")
        before, after = evidence.speeds[0], evidence.speeds[-1]
        change = (after / before - 1) * 100 if before else 0.0
        problems = []
        if change < -self.loss_percent:
            problems.append(f"it is {-change:.1f} % slower; {self.loss_percent:g} % is the most")
        figure = f"{before / 1e6:.2f} million writes per CPU second before, {after / 1e6:.2f} after ({change:+.1f} %)"
        return self.found(figure, problems, {"before": before, "after": after, "change_percent": change})
