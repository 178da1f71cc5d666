"""How migrations ended, and where the guests are."""

from typing import ClassVar

from sterna.testbed.checks.finding import BaseCheck, Finding
from sterna.testbed.evidence import Evidence
from sterna.testbed.settings import Milliseconds


class CompletedCheck(BaseCheck, tag="completed", frozen=True):
    """Every migration completed, and the guest went on at the destination."""

    claim: ClassVar[str] = "migrations complete, and the guest goes on at the destination"

    def judge(self, evidence: Evidence) -> Finding:
        if not evidence.passages:
            return self.skipped("no migration was to complete")
        problems = []
        for record in evidence.passages:
            name = f"{record.guest}, {record.source} to {record.destination}"
            if not record.completed:
                reason = record.info.get("error-desc", "no reason given")
                problems.append(f"{name}: {record.info.get('status', 'no status')}: {reason}")
            problems += [f"{name}: {problem}" for problem in record.problems]
        done = [record for record in evidence.passages if record.completed]
        values = {
            "migrations": len(evidence.passages),
            "completed": len(done),
            "longest_ms": max((record.total_ms for record in done), default=0.0),
            "passes": max((record.pass_count for record in done), default=0),
            "bytes": sum(record.transferred for record in done),
        }
        figure = f"{len(done)} of {len(evidence.passages)}"
        if done:
            longest, passes = values["longest_ms"] / 1000, int(values["passes"])
            figure += f", at most {longest:.1f} s and {passes} passes, {values['bytes'] / 1e6:.0f} MB"
        return self.found(figure, problems, values)


class DowntimeCheck(BaseCheck, tag="downtime", frozen=True):
    """No guest stood still longer than the limit, by the source's report.

    :ivar limit_ms: the longest
    """

    limit_ms: Milliseconds
    timed: ClassVar[bool] = True
    claim: ClassVar[str] = "the downtime stays below its limit"

    def judge(self, evidence: Evidence) -> Finding:
        times = [record.downtime_ms for record in evidence.passages if record.completed]
        if not times:
            return self.skipped("no migration completed")
        longest = max(times)
        problems = []
        if longest > self.limit_ms:
            problems.append(f"a guest stood still for {longest:.1f} ms; the limit is {self.limit_ms:g} ms")
        figure = f"{longest:.1f} ms at most, limit {self.limit_ms:g} ms"
        return self.found(figure, problems, {"downtime_ms": longest, "limit_ms": self.limit_ms})


class CancelledCheck(BaseCheck, tag="cancelled", frozen=True):
    """Each cancelled migration ended as such, soon, and its guest ran on.

    :ivar limit_ms: from the command to the outcome
    """

    limit_ms: Milliseconds = 2000.0
    timed: ClassVar[bool] = True
    claim: ClassVar[str] = "migrate_cancel cancels at once wherever the migration is, and the guest runs on"

    def judge(self, evidence: Evidence) -> Finding:
        if not evidence.cancelled:
            return self.skipped("no migration was cancelled")
        problems = []
        for cancelled in evidence.cancelled:
            where = f"at {cancelled.point:.2f} of RAM"
            if cancelled.status != "cancelled":
                problems.append(f"{where}: the migration is {cancelled.status}")
            if not cancelled.runs:
                problems.append(f"{where}: the guest does not run on")
            if cancelled.ms > self.limit_ms:
                problems.append(f"{where}: it took {cancelled.ms:.0f} ms; the limit is {self.limit_ms:g} ms")
        slowest = max(cancelled.ms for cancelled in evidence.cancelled)
        figure = f"{len(evidence.cancelled)} points, {slowest:.0f} ms at most"
        return self.found(figure, problems, {"points": len(evidence.cancelled), "slowest_ms": slowest})


class OneSideCheck(BaseCheck, tag="one-side", frozen=True):
    """After each fault the guest runs on exactly one side with its memory whole; or it has gone with its host."""

    claim: ClassVar[str] = "whatever breaks, the guest survives on exactly one side, and no data is lost"

    def judge(self, evidence: Evidence) -> Finding:
        if not evidence.injured:
            return self.skipped("; ".join(evidence.skipped) or "nothing was broken")
        problems = []
        for case in evidence.injured:
            name = f"{case.fault} during {case.phase}"
            if len(case.runs_at) > 1:
                problems.append(f"{name}: the guest runs on {' and '.join(case.runs_at)}")
            elif not case.runs_at and not case.may_be_gone:
                problems.append(f"{name}: the guest runs nowhere ({case.status})")
            elif not set(case.runs_at) <= set(case.allowed):
                problems.append(f"{name}: the guest runs on {case.runs_at[0]} ({case.status})")
            if case.note:
                problems.append(f"{name}: {case.note}")
            problems += [f"{name}: {problem}" for problem in case.problems]
        lost = sum(not case.runs_at for case in evidence.injured)
        pages = sum(case.pages_checked for case in evidence.injured)
        figure = f"{len(evidence.injured)} faults, {pages} pages compared"
        if lost:
            figure += f"; {lost} guests died with their host"
        if evidence.skipped:
            figure += f"; left out: {', '.join(evidence.skipped)}"
        return self.found(figure, problems, {"faults": len(evidence.injured), "pages": pages, "lost": lost})
