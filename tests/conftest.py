"""What holds for all tests."""

import os
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # an emulated host has what its tests need
    pass
else:
    # How long an example takes says nothing here: kernels are compiled in the first, and machines are busy.
    _patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    # The same examples each time, none remembered: what a search found is written down with its test, as an example.
    settings.register_profile("sterna", _patient, derandomize=True, database=None)
    # The search, of `make fuzz`: others each time, and what fails comes first the next time.
    settings.register_profile("search", _patient, print_blob=True)
    settings.load_profile("sterna")


_ALONE = {"arm64", "testbed"}
"""Folders of tests that look at the whole machine, or need much of it: one after the other, where tests run in parallel."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folders = _ALONE & set(Path(nodeid.partition("::")[0]).parts)
            return "alone" if folders else nodeid

    return Scheduling(config, log)


@pytest.fixture
def root() -> None:
    """Only as root."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
