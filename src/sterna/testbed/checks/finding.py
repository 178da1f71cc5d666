"""What a check found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import msgspec

from sterna.testbed.evidence import Evidence

_PROBLEMS = 20


class CheckVerdict(Enum):
    """SKIPPED: there was nothing to judge, and the figure says why."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """
    :ivar check: the check's kind
    :ivar claim: what ought to hold, in one line
    :ivar figure: what was measured, for people
    :ivar values: the same for machines
    :ivar problems: what was wrong, one line each; empty when it passed
    """

    check: str
    claim: str
    verdict: CheckVerdict
    figure: str
    values: Mapping[str, float] = field(default_factory=dict)
    problems: Sequence[str] = ()


class BaseCheck(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", tag_field="kind", frozen=True):
    """A check as a scenario file declares it: its kind and its limits.

    :cvar timed: whether it holds times against limits, which a busy machine may miss
    """

    claim: ClassVar[str]
    timed: ClassVar[bool] = False

    def judge(self, evidence: Evidence) -> Finding:
        """Compare what was seen with the limits."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """As in a scenario file."""
        return str(self.__struct_config__.tag)

    def found(
        self, figure: str, problems: Sequence[str], values: Mapping[str, float] | None = None
    ) -> Finding:
        """Passed without problems, failed with some."""
        verdict = CheckVerdict.FAILED if problems else CheckVerdict.PASSED
        shown = list(problems[:_PROBLEMS])
        if len(problems) > _PROBLEMS:
            shown.append(f"and {len(problems) - _PROBLEMS} more")
        return Finding(self.kind, self.claim, verdict, figure, values or {}, shown)

    def skipped(self, why: str) -> Finding:
        """Nothing to judge."""
        return Finding(self.kind, self.claim, CheckVerdict.SKIPPED, why)
