"""Compiled code is at hand before a migration needs it: a guest that stands still would wait for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sterna.memory.kernel import COMPILED

TESTS = Path(__file__).parent.parent

PROGRAM = """
import json, sys
from tests.migration.pairs import TCP, hosts, source_guest, waiting_guest
from sterna.cli.kernels import prepare_kernels
from sterna.memory import kernelcode

prepare_kernels()
late = []
fetch = kernelcode.fetch
def noted(kernel, key):
    late.append(f"{kernel.name} {key}")
    return fetch(kernel, key)
kernelcode.fetch = noted
for multifd in (False, True):
    with hosts(source_guest(700, steps_per_look=350), waiting_guest(700)) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities({"multifd": multifd})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.verified, info.error
assert late or "numba" not in sys.modules
print(json.dumps(late))
"""


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is compiled")
def test_a_migration_fetches_none() -> None:
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=TESTS.parent, capture_output=True, text=True, timeout=600
    )
    assert program.returncode == 0, program.stderr
    assert json.loads(program.stdout.splitlines()[-1]) == []
