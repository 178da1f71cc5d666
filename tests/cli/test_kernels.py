"""Compiled code is at hand before a migration needs it: a guest that stands still would wait for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sterna.memory.kernel import COMPILED

TESTS = Path(__file__).parent.parent

PROGRAM = """
import json
from numba.core.dispatcher import Dispatcher
from tests.migration.pairs import TCP, hosts, source_guest, waiting_guest
from sterna.cli.kernels import prepare_kernels

prepare_kernels()
late = []
fetch = Dispatcher.compile
def noted(self, signature):
    late.append(f"{self.py_func.__qualname__}{signature}")
    return fetch(self, signature)
Dispatcher.compile = noted
for multifd in (False, True):
    with hosts(source_guest(700, steps_per_look=350), waiting_guest(700)) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities({"multifd": multifd})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.verified, info.error
print(json.dumps(late))
"""


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is compiled")
def test_a_migration_fetches_none() -> None:
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=TESTS.parent, capture_output=True, text=True, timeout=600
    )
    assert program.returncode == 0, program.stderr
    assert json.loads(program.stdout.splitlines()[-1]) == []
