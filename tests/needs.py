"""What some tests need of this machine. Where it is missing they are skipped, or fail where CI says that it has to be there."""

import os
import shutil

import pytest


def qemu_program(name: str = "qemu-system-arm") -> str:
    """The path of a QEMU."""
    found = shutil.which(name)
    if found is None and os.environ.get("STERNA_REQUIRE_QEMU") == "1":
        pytest.fail(f"{name} is missing, and STERNA_REQUIRE_QEMU=1")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
