"""What pytest does besides in a run on a changed tree: order, limits and a report. And, when tests are recorded, which ran what.

`MUTANTS_REPORT` names a file that gets a line for each test when it begins and when it has ended. `MUTANTS_PLAN` names one with
the tests' order and their time limits, as JSON: `[[name, seconds], ...]`.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_ERRORS = os.fdopen(os.dup(2), "w")
"""Standard error, also while pytest captures it."""
_PLAN: dict[str, float] = dict(
    json.loads(Path(plan).read_text()) if (plan := os.environ.get("MUTANTS_PLAN")) else ()
)


def _say(**line: object) -> None:
    with open(os.environ["MUTANTS_REPORT"], "a") as report:
        report.write(json.dumps(line) + "\n")


def _context(name: str) -> None:
    """Lines that run from now on were run by this test."""
    if (coverage := sys.modules.get("coverage")) and (recording := coverage.Coverage.current()) is not None:
        recording.switch_context(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _PLAN:
        order = {name: place for place, name in enumerate(_PLAN)}
        items.sort(key=lambda item: order.get(item.nodeid, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _say(began=item.nodeid)
    _context(item.nodeid)
    began = time.monotonic()
    if item.nodeid in _PLAN:
        # A thread of C's own ends the process: also one in a loop that has the interpreter's lock, or needs none.
        faulthandler.dump_traceback_later(_PLAN[item.nodeid], exit=True, file=_ERRORS)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        _context("")
        _say(ended=item.nodeid, seconds=round(time.monotonic() - began, 3))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = (str(report.longrepr).strip().splitlines() or [""])[-1] if report.failed else ""
        _say(test=report.nodeid, outcome=report.outcome, why=why)
