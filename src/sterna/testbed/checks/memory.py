"""Whether guest RAM arrived as it was."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sterna.testbed.checks.finding import BaseCheck, Finding
from sterna.testbed.evidence import Evidence


class ContentCheck(BaseCheck, tag="content", frozen=True):
    """Every page holds what the guest's program must have written, told from the program's own count."""

    claim: ClassVar[str] = "no page is lost: RAM holds what the guest must have written"

    def judge(self, evidence: Evidence) -> Finding:
        checked = [record for record in evidence.passages if record.pages_checked is not None]
        if not checked:
            return self.skipped("no guest's memory was looked at")
        problems = [problem for record in checked for problem in record.content]
        pages = sum(record.pages_checked or 0 for record in checked)
        figure = f"{pages} pages compared after {len(checked)} migrations, {len(problems)} problems"
        return self.found(figure, problems, {"pages": pages, "problems": len(problems)})


class AuditCheck(BaseCheck, tag="audit", frozen=True):
    """After every harvest RAM was as it had been sent, but for pages that the harvest or the log had. Of a VM whose log nobody
    can look at: once the guest had stopped, RAM was as it had been sent.
    """

    claim: ClassVar[str] = "no write is lost: the dirty log has every page that is not as it was sent"

    def judge(self, evidence: Evidence) -> Finding:
        told = [record.info.get("x-sterna", {}).get("audit") for record in evidence.passages]
        audits = [audit for audit in told if audit]
        forwarded = [record for record in evidence.passages if record.chunks_forwarded]
        if audits:
            return self._judge_audits(audits)
        if not forwarded:
            return self.skipped("no source was audited")
        problems = [problem for record in forwarded for problem in record.lost]
        chunks = sum(record.chunks_forwarded for record in forwarded)
        figure = (
            f"{chunks * 2} MiB of the source compared with what was sent, after {len(forwarded)} migrations, "
            f"{len(problems)} regions differ"
        )
        return self.found(figure, problems, {"mib": chunks * 2, "differ": len(problems)})

    def _judge_audits(self, audits: Sequence[Mapping[str, Any]]) -> Finding:
        problems = []
        for audit in audits:
            for lost in audit["lost"]:
                problems.append(
                    f"page {lost['address']:#x} (slot {lost['slot']}), sent in pass {lost['sent-in-pass']}, was written and is "
                    f"not in the log after pass {lost['found-after-pass']}"
                )
        harvests, pages, lost_pages = (
            sum(audit[name] for audit in audits) for name in ("harvests", "pages-judged", "lost-pages")
        )
        longest = max(audit["longest-hold-ms"] for audit in audits)
        figure = (
            f"{pages} pages compared after {harvests} harvests, {lost_pages} with lost writes; "
            f"the guest held for {longest:.1f} ms at most"
        )
        values = {"pages": pages, "harvests": harvests, "lost": lost_pages, "longest_hold_ms": longest}
        return self.found(figure, problems, values)


class DigestCheck(BaseCheck, tag="digest", frozen=True):
    """RAM at both ends is equal after the migration and before the guest starts."""

    claim: ClassVar[str] = "checksums of RAM are equal at both ends before the guest starts"

    def judge(self, evidence: Evidence) -> Finding:
        checked = [record for record in evidence.passages if record.chunks_compared]
        if not checked:
            return self.skipped("no destination held its guest back")
        problems = [problem for record in checked for problem in record.digest]
        chunks = sum(record.chunks_compared for record in checked)
        figure = f"{chunks * 2} MiB compared after {len(checked)} migrations, {len(problems)} regions differ"
        return self.found(figure, problems, {"mib": chunks * 2, "differ": len(problems)})


class ReclaimedCheck(BaseCheck, tag="reclaimed", frozen=True):
    """The host did take memory from the guest, so that the other checks say something."""

    claim: ClassVar[str] = "the host takes memory from the guest before and during the migration"

    def judge(self, evidence: Evidence) -> Finding:
        if not evidence.reclaimed:
            return self.skipped("; ".join(evidence.skipped) or "the host took nothing")
        figure = ", ".join(f"{name} {value:.0f}" for name, value in evidence.reclaimed.items())
        if evidence.skipped:
            figure += f"; left out: {', '.join(evidence.skipped)}"
        problems = [f"{name}: none" for name, value in evidence.reclaimed.items() if value <= 0]
        return self.found(figure, problems, evidence.reclaimed)
