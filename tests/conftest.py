"""What holds for all tests."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _ALONE & set(Path(item.nodeid.partition("::")[0]).parts):
            item.add_marker(pytest.mark.xdist_group("alone"))
