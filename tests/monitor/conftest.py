"""Fixtures of the monitor's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.monitor.qmpserver import ServerThread, SmallTable, serving


@pytest.fixture
def table() -> SmallTable:
    return SmallTable()


@pytest.fixture
def server(table: SmallTable, tmp_path: Path) -> Iterator[ServerThread]:
    with serving(table.execute, tmp_path / "qmp.sock") as running:
        yield running
