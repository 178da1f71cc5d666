"""Hosts without a compiler: KVM's guests run and migrate there all the same."""

import subprocess
import sys

WITHOUT_A_COMPILER = """
import sys
sys.modules["numba"] = sys.modules["unicorn"] = None
import numpy as np
import sterna.cli.demo, sterna.cli.run, sterna.machine.machine, sterna.migration.controller, sterna.migration.incoming
import sterna.hypervisor.kvm.vm
from sterna.cli.kernels import prepare_kernels
from sterna.memory import kernel
from sterna.memory.bitmap import page_numbers
from sterna.stream import xbzrle
assert not kernel.COMPILED
prepare_kernels()
assert page_numbers(np.array([5, 1], dtype=np.uint64)).tolist() == [0, 2, 64]
assert xbzrle.encode.twin is xbzrle.encode
"""


def test_all_but_emulation_works_without_a_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "compiling" not in done.stderr
