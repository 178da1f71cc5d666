"""What holds for all tests."""

import os
from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:  # an emulated host has what its tests need
    pass
else:
    # How long an example takes says nothing here: kernels are compiled in the first, and machines are busy.
    settings.register_profile("sterna", deadline=None)
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
