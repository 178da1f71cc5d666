"""Whether a conversation with the guest goes on."""

from typing import ClassVar

from sterna.testbed.checks.finding import BaseCheck, Finding
from sterna.testbed.evidence import Evidence
from sterna.testbed.limits import Milliseconds


class ConversationCheck(BaseCheck, tag="ssh-session", frozen=True):
    """The session that was opened before the migration answers after it, and every answer was the right one.

    :ivar silence_ms: the longest that it may take to answer; TCP sends again after some hundred ms, and then ever later
    """

    silence_ms: Milliseconds = 5000.0
    timed: ClassVar[bool] = True
    claim: ClassVar[str] = "an ssh session that was opened before the migration goes on after it"

    def judge(self, evidence: Evidence) -> Finding:
        if not evidence.conversations:
            return self.skipped("no session was opened")
        problems = [problem for seen in evidence.conversations for problem in seen.problems]
        answers = sum(seen.answers for seen in evidence.conversations)
        silence = max(seen.silence_ms for seen in evidence.conversations)
        if silence > self.silence_ms:
            problems.append(f"it was silent for {silence:.0f} ms; {self.silence_ms:g} ms is the most")
        figure = f"{answers} answers, silent for {silence:.0f} ms at most"
        return self.found(figure, problems, {"answers": answers, "silence_ms": silence})
