"""Runs scenarios and judges what they saw."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import msgspec

from sterna.host.load import HostWatch
from sterna.launch.errors import LaunchError, Unsupported
from sterna.testbed.bed import Bed, ScenarioContext
from sterna.testbed.checks import Check, CheckVerdict, Finding
from sterna.testbed.errors import ScenarioError
from sterna.testbed.evidence import Evidence
from sterna.testbed.kind import VmKind
from sterna.testbed.scenario import ScenarioFile


class ScenarioOutcome(Enum):
    """PASSED: every check held, those skipped apart. FAILED: one did not. SKIPPED: this machine or VM cannot. ERROR: the
    bed could not do it.
    """

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    ERROR = "error"


@dataclass(frozen=True)
class Result:
    """One run of one scenario.

    :ivar reason: why it was skipped, or what the error was
    :ivar note: what the bed could not do here, though it ran, and what is known of the VM under test
    """

    scenario: str
    title: str
    vm: str
    outcome: ScenarioOutcome
    seconds: float
    findings: list[Finding] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)
    reason: str = ""
    note: str = ""


def run_scenario(
    file: ScenarioFile,
    kind: VmKind,
    say: Callable[[str], None] = lambda text: None,
    *,
    reduced: bool = False,
    audit: bool = False,
) -> Result:
    """Run one scenario from nothing to nothing.

    :param audit: have VMs that can audit every harvest of the dirty log do so, whatever the scenario says
    :raise ScenarioError: When the file is wrong.
    """
    scenario = file.scenario(kind.name, reduced=reduced)
    evidence = Evidence()
    began, watch = time.monotonic(), HostWatch()
    note = ""

    def result(outcome: ScenarioOutcome, findings: list[Finding], reason: str = "") -> Result:
        seconds = time.monotonic() - began
        evidence.host = evidence.host or watch.load()
        return Result(
            file.name, scenario.title, kind.name, outcome, seconds, findings, evidence, reason, note
        )

    try:
        kind.check(say)
        with Bed(kind, scenario.network.bytes_per_second, say) as bed:
            note = "; ".join(filter(None, (bed.network.note, kind.note)))
            migration = scenario.migration
            if audit:
                migration = msgspec.structs.replace(migration, audit=True)
            scenario.procedure.run(ScenarioContext(bed, scenario.vm, migration), evidence)
    except ScenarioError:
        raise
    except Unsupported as error:
        return result(ScenarioOutcome.SKIPPED, [], str(error))
    except LaunchError as error:
        # What was seen before it broke may tell why.
        evidence.host = watch.load()
        findings = judge(scenario.check, evidence) if evidence.passages else []
        return result(ScenarioOutcome.ERROR, findings, str(error))
    except Exception as error:  # a fault of ours must not hide the scenarios that follow
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        return result(ScenarioOutcome.ERROR, [], text)
    evidence.host = watch.load()
    findings = judge(scenario.check, evidence)
    verdicts = {finding.verdict for finding in findings}
    if CheckVerdict.FAILED in verdicts:
        return result(ScenarioOutcome.FAILED, findings)
    if CheckVerdict.PASSED not in verdicts:
        return result(ScenarioOutcome.SKIPPED, findings, findings[0].figure)
    return result(ScenarioOutcome.PASSED, findings)


def judge(checks: Sequence[Check], evidence: Evidence) -> list[Finding]:
    """What each finds. One that holds times against limits says besides, when they do not hold, how busy the host was."""
    findings = []
    for check in checks:
        finding = check.judge(evidence)
        if check.timed and finding.problems and evidence.host:
            finding = replace(finding, problems=[*finding.problems, str(evidence.host)])
        findings.append(finding)
    return findings
