"""What holds for all tests."""

import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from tests.needs import qemu_program

from sterna.host.load import HostWatch

pytest_plugins = ["tests.fastset"]
if "sterna.testing.conformance" not in sys.modules:  # a user of the suite has named its plugin
    pytest.register_assert_rewrite("sterna.testing.conformance")

_ALONE = ("testbed", "arm64")
"""Folders whose tests run one after the other where tests run in parallel: those of `testbed` look at the whole machine, those of
`arm64` need much of it. Neither sees the other: they have nothing in common but processors, so each goes its own way.
"""
_TOGETHER = {"test_fuzz.py", "test_live.py", "test_qemu_streams.py", "test_xbzrle_qemu.py"}
"""Files whose tests share what takes longer to make than to look at: in one process, so that it is made once."""


def pytest_configure(config: pytest.Config) -> None:
    # Programs started in the background by a script, or by `nohup`, ignore these, and so do those that they start.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    # Emulated hosts run tests without it, and take seconds to import it.
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings
        from hypothesis.database import DirectoryBasedExampleDatabase

        # How long an example takes says nothing here: kernels are compiled in the first, and machines are busy.
        # Whatever the two profiles differ in is named by both: Hypothesis' own defaults are others where CI is set.
        patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
        # The same examples each time, none remembered: what a search found is written down with its test, as an example.
        settings.register_profile("sterna", patient, derandomize=True, database=None)
        # The search, of `make fuzz`: others each time, and what fails comes first the next time.
        settings.register_profile(
            "search",
            patient,
            derandomize=False,
            database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
            print_blob=True,
        )
        settings.load_profile("sterna")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            alone = next((folder for folder in _ALONE if folder in path.parts), None)
            return alone or (str(path) if path.name in _TOGETHER else nodeid)

    return Scheduling(config, log)


_WATCH_SECONDS = 1.0
"""How old a look at the host may be where a test begins: for each of those that take no time it would take more than they do."""
_WATCHED = pytest.StashKey[tuple[float, HostWatch]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    looked, _ = item.config.stash.get(_WATCHED, (0.0, None))
    if time.monotonic() - looked > _WATCH_SECONDS:
        item.config.stash[_WATCHED] = (time.monotonic(), HostWatch())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails says how busy the host was: it may be that it only came too late."""
    report = yield
    if report.failed:
        report.sections.append(("host", str(item.config.stash[_WATCHED][1].load())))
    return report


@pytest.fixture
def root() -> None:
    """Only as root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def qemu() -> str:
    """Path of qemu-system-arm."""
    return qemu_program()
