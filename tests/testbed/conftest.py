"""Networks and processes of the test bed."""

import os

import pytest

from cli.conftest import _compiled, _same_program, cli, command_line  # noqa: F401 - fixtures


@pytest.fixture
def root() -> None:
    """Only as root."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
