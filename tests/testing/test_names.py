"""What `sterna.testing` offers."""

import subprocess
import sys

import pytest

from sterna import testing


def test_every_name_is_there() -> None:
    for name in testing.__all__:
        assert getattr(testing, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = testing.nothing


def test_doubles_bring_neither_pytest_nor_an_emulated_cpu() -> None:
    program = (
        "import sys\nfrom sterna.testing import DoubleGuest, RecordingFlush\n"
        "print(sorted({'pytest', 'unicorn', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
