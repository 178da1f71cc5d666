"""Whether guest RAM arrived as it was."""

from typing import ClassVar

from sterna.testbed.checks.finding import BaseCheck, Finding
from sterna.testbed.evidence import Evidence


class ContentCheck(BaseCheck, tag="content", frozen=True):
    """Every page holds what the guest's program must have written, told from the program's own count."""

    claim: ClassVar[str] = "no page is lost: RAM holds what the guest must have written"

    def judge(self, evidence: Evidence) -> Finding:
        looked = [passage for passage in evidence.passages if passage.pages_checked is not None]
        if not looked:
            return self.skipped("no guest's memory was looked at")
        problems = [problem for passage in looked for problem in passage.content]
        pages = sum(passage.pages_checked or 0 for passage in looked)
        figure = f"{pages} pages compared after {len(looked)} migrations, {len(problems)} problems"
        return self.found(figure, problems, {"pages": pages, "problems": len(problems)})


class DigestCheck(BaseCheck, tag="digest", frozen=True):
    """RAM at both ends is equal after the migration and before the guest starts."""

    claim: ClassVar[str] = "checksums of RAM are equal at both ends before the guest starts"

    def judge(self, evidence: Evidence) -> Finding:
        looked = [passage for passage in evidence.passages if passage.chunks_compared]
        if not looked:
            return self.skipped("no destination held its guest back")
        problems = [problem for passage in looked for problem in passage.digest]
        chunks = sum(passage.chunks_compared for passage in looked)
        figure = f"{chunks * 2} MiB compared after {len(looked)} migrations, {len(problems)} regions differ"
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
