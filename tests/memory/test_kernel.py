"""Hosts without a compiler: KVM's guests run and migrate there all the same."""

import subprocess
import sys

import pytest

from sterna.memory.kernel import COMPILED

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


UPON_THE_FIRST_CALL = """
import sys, threading
import numpy as np
from sterna.memory.ram import RamBlock
from sterna.stream import ram_kernels
from sterna.stream.ram_kernels import copy, decode_records
before = decode_records
assert "numba" not in sys.modules
name, ram = np.frombuffer(b"a", np.uint8).copy(), np.zeros(8192, np.uint8)
body = np.zeros(8 + 4096 + 8, np.uint8)
body[5:8], body[8:-8], body[-1] = (0, 0x10, 0x28), 5, 0x10
def call():
    written, received = np.zeros(1, np.uint8), np.zeros(1, np.uint64)
    ends.append(tuple(map(int, before(body, 0, body.size, name, ram, 12, received, written, True, np.zeros(3, np.int64)))))
ends = []
threads = [threading.Thread(target=call) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert ends == [(body.size, 1)] * 4, ends
assert (ram[4096:] == 5).all() and not ram[:4096].any()
from numba.core.dispatcher import Dispatcher
# Those who call it in its module need not ask twice, nor does compiled code that calls another.
assert isinstance(ram_kernels.decode_records, Dispatcher) and isinstance(ram_kernels.copy, Dispatcher)
assert before.dispatcher() is ram_kernels.decode_records
assert before.twin is ram_kernels.decode_records.twin
assert len(before.signatures) == 1
copy(ram[:4096], body[8:-8])
assert (ram == 5).all()
"""


@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
@pytest.mark.parametrize("cached", [True, False])
def test_a_kernel_is_fetched_by_the_first_call_once(cached: bool, tmp_path, monkeypatch) -> None:
    """From the disk, or compiled with the kernels that it calls; by several threads at once."""
    if not cached:
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", UPON_THE_FIRST_CALL], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
