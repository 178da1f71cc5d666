"""Results for machines: JSON with everything that was seen, and JUnit XML for CI."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import msgspec

from sterna.testbed.checks import CheckVerdict
from sterna.testbed.runner import Result, ScenarioOutcome


def to_json(results: Sequence[Result]) -> str:
    """One object; `evidence` is `sterna.testbed.evidence.Evidence`."""
    counts = {
        outcome.value: sum(result.outcome is outcome for result in results) for outcome in ScenarioOutcome
    }
    return msgspec.json.encode({"outcomes": counts, "results": results}).decode()


def to_junit(results: Sequence[Result]) -> bytes:
    """A test suite for each scenario, a test case for each check."""
    root = ElementTree.Element("testsuites")
    for result in results:
        suite = ElementTree.SubElement(root, "testsuite", name=f"{result.scenario} ({result.vm})")
        cases = [_case(suite, result, finding.check) for finding in result.findings]
        for case, finding in zip(cases, result.findings, strict=True):
            if finding.verdict is CheckVerdict.FAILED:
                failure = ElementTree.SubElement(case, "failure", message=_clean(finding.figure))
                failure.text = _clean("\n".join(finding.problems))
            elif finding.verdict is CheckVerdict.SKIPPED:
                ElementTree.SubElement(case, "skipped", message=_clean(finding.figure))
            ElementTree.SubElement(case, "system-out").text = _clean(f"{finding.claim}: {finding.figure}")
        if result.outcome is ScenarioOutcome.ERROR:
            ElementTree.SubElement(_case(suite, result, "run"), "error", message=_clean(result.reason))
        elif result.outcome is ScenarioOutcome.SKIPPED and not cases:
            ElementTree.SubElement(_case(suite, result, "run"), "skipped", message=_clean(result.reason))
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
        suite.set("tests", str(len(suite.findall("testcase"))))
        suite.set("time", f"{result.seconds:.3f}")
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _case(suite: ElementTree.Element, result: Result, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", name=name, classname=f"testbed.{result.vm}.{result.scenario}"
    )


def _clean(text: str) -> str:
    """XML has no control characters, even escaped (XML 1.0, 2.2)."""
    return "".join(
        char if char in "\t\n" or (char >= " " and char not in "\ufffe\uffff") else "?" for char in text
    )
