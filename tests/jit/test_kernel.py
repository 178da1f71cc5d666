"""Hosts without a compiler: KVM's guests run and migrate there all the same."""

import contextlib
import errno
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray
from tests import refusal
from tests.hosttree import MIB, HostTree, host

import sterna
from sterna.jit import ahead
from sterna.jit.kernel import COMPILED, READONLY, Kernel, KernelError, kernel

__all__ = ["host"]

Bytes: TypeAlias = NDArray[np.uint8]

WITHOUT_A_COMPILER = """
import sys
sys.modules["numba"] = sys.modules["unicorn"] = None
import numpy as np
import sterna.cli.demo, sterna.cli.run, sterna.machine.machine, sterna.migration.controller, sterna.migration.destination.listen
import sterna.hypervisor.kvm.vm
from sterna.cli.kernels import prepare_kernels
from sterna.jit import kernel
from sterna.memory.bitmap import page_numbers
from sterna.stream.xbzrle import coding
assert not kernel.COMPILED
prepare_kernels()
assert page_numbers(np.array([5, 1], dtype=np.uint64)).tolist() == [0, 2, 64]
assert coding.encode.twin is coding.encode

@kernel.kernel(ahead=False)
def count(word: int) -> int:
    return word.bit_count()

late = kernel.Late("sterna.jit.intrinsics:stack_words")

@kernel.kernel()
def compiled_only() -> int:
    return late(1).size

assert count.twin(7) == count(7) == 3
assert isinstance(compiled_only, kernel.Kernel)
"""


@pytest.mark.slow
def test_all_but_emulation_works_without_a_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "compiling" not in done.stderr


PAGES_WITHOUT_A_COMPILER = """
import io, sys, warnings
sys.modules["numba"] = None
import numpy as np
warnings.simplefilter("error")  # of sums that overflow, too
from sterna.analysis.ram_survey import RamSurveyor
from sterna.memory.ram import RamBlock
from sterna.memory.rollingdigest import digest_ram
from sterna.stream.multifd.format import PacketFormat
from sterna.stream.multifd.packets import IN_THE_BLOCK, head_of, packets_of
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.ram.encoder import Batch, encode_pages
from sterna.stream.ram.records import bytes_at
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.stream.reader import StreamReader
from sterna.stream.xbzrle.cache import XbzrleCache

def wire(vectors):
    return b"".join(bytes_at(address, size) for address, size in vectors.tolist())

source, target = RamBlock("ram", 4 << 12), RamBlock("ram", 4 << 12)
source.data[4096:12288] = 255
pages, setup = np.arange(4), ram_setup([("ram", 4 << 12)])
body = encode_pages(source, pages).tobytes()
cache = XbzrleCache([source], 4 << 12, from_start=True)
cache.encode(Batch(source, pages), 2)
source.data[[4096, 8000, 12288]] = 7
source.data[8192:12288] = 0
body += wire(cache.encode(Batch(source, pages), 3, suffix=END_OF_RECORDS).iov)
decoder, surveyor = RamDecoder([target]), RamSurveyor(12, digests=True)
for who in (decoder, surveyor):
    reader = StreamReader(io.BytesIO(setup + body))
    who.read_setup(reader)
    who.read_records(reader)
found = decoder.statistics()
assert (found.normal, found.duplicate, found.changed) == (2, 4, 2), found
assert np.array_equal(source.data, target.data)
[block] = surveyor.blocks()
assert (block.normal, block.zero, block.changed, block.repeated) == (2, 4, 2, 4), block
assert surveyor.digest().hex == digest_ram([source]).hex
packets = PacketFormat(12)
vectors, headers = packets_of(packets, head_of(packets, source), source, pages, IN_THE_BLOCK, 0)
data = wire(vectors)
packet = packets.decode(data[:packets.header_bytes])
surveyor.take_packet("ram", packet.pages, data[packets.header_bytes:], len(data))
assert surveyor.digest().hex == digest_ram([source]).hex
"""


def test_pages_are_sent_and_taken_without_a_compiler() -> None:
    run(PAGES_WITHOUT_A_COMPILER)


UPON_THE_FIRST_CALL = """
import sys, threading
import numpy as np
from sterna.memory.ram import RamBlock
from sterna.jit.kernel import Kernel
from sterna.memory.content import copy
from sterna.stream.ram.records import apply_records, new_received, new_rows
before = apply_records
assert "numba" not in sys.modules
name, ram = np.frombuffer(b"a", np.uint8).copy(), np.zeros(8192, np.uint8)
body = np.zeros(8 + 4096 + 8, np.uint8)
body[5:8], body[8:-8], body[-1] = (0, 0x10, 0x28), 5, 0x10
def call():
    written, received = np.zeros(1, np.uint8), np.zeros(1, np.uint64)
    ends.append(tuple(map(int, before(body, 0, body.size, name, new_received(12, True), ram, received, written, new_rows()))))
ends = []
threads = [threading.Thread(target=call) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert ends == [(body.size, 1)] * 4, ends
assert (ram[4096:] == 5).all() and not ram[:4096].any()
assert isinstance(before, Kernel)
assert len(before._code) == 1
copy(ram[:4096], body[8:-8])
assert (ram == 5).all()
assert ("numba" in sys.modules) == (sys.argv[1] == "compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_a_kernel_is_fetched_by_the_first_call_once(tmp_path, monkeypatch) -> None:
    """Compiled, and the next time from the disk and without the compiler; by several threads at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for how in ("compiled", "kept"):
        run(UPON_THE_FIRST_CALL, how)


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


AHEAD = """
import sys
import numpy as np
from sterna.memory import bitmap, shadow
from sterna.jit.ahead import fetch_kernels
told = []
fetch_kernels(told.append)
print(*told, sep="\\n", file=sys.stderr)
assert bitmap.page_numbers(np.array([5, 1], dtype=np.uint64)).tolist() == [0, 2, 64]
assert "numba" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_kernels_are_compiled_ahead_by_other_processes_and_how_far_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numba.py").write_text("raise SystemExit('a module of the directory that the user is in')\n")
    steps = [f"compiling kernels (once): {n} of 3" for n in range(4)]
    assert run(f"import sys; sys.path.remove(''){AHEAD}").splitlines() == steps
    assert run(f"import sys; sys.path.remove(''){AHEAD}").split() == []


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_without_a_cache_they_are_compiled_all_the_same(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    said = run(AHEAD).splitlines()
    assert [line for line in said if "anew" in line] == [said[0]]
    assert said[-1] == "compiling kernels (once): 3 of 3"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


SPOILT = """
import sys
from sterna.jit import kernelcache
from sterna.memory import bitmap
from sterna.jit.code import file_name, find
kernel = bitmap._page_numbers
name = file_name(kernel, kernel.expected)
good = kernelcache.read(name)
head, _, code = good.partition(b"\\n")
for bad in (b"", head, good[:-1], head + b"\\n\\x90" + code, b"[]\\n" + code):
    assert bad != good
    kernelcache.write(name, bad)
    assert find(kernel, kernel.expected) is None, bad[:200]
kernelcache.write(name, good)
assert find(kernel, kernel.expected) is not None
"""


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_code_that_is_cut_short_or_spoilt_is_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(f"{AHEAD}{SPOILT}")


@pytest.mark.parametrize(
    ("quota", "memory", "places"),
    [
        ("max 100000", 8192, min(4, len(os.sched_getaffinity(0)))),
        ("100000 100000", 8192, 1),
        ("max 100000", 500, 1),
        ("max 100000", 10, 1),
    ],
)
def test_as_many_compile_at_once_as_the_control_group_has_processors_and_memory_for(
    host: HostTree, quota: str, memory: int, places: int
) -> None:
    host.write("proc/meminfo", f"MemTotal: {16 << 20} kB\nMemAvailable: {4 * 300 << 10} kB\n")
    host.unified("/job")
    host.group("job", cpu__max=quota, memory__max=memory * MIB, memory__current=0)
    assert ahead._places() == places


def test_those_processes_compile_that_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Few(ahead._Compiler):
        """The second cannot be started."""

        def __init__(self) -> None:
            if started:
                raise BlockingIOError(errno.EAGAIN, "no more")
            super().__init__()
            started.append(self)

    monkeypatch.setattr(ahead, "_Compiler", Few)
    with contextlib.ExitStack() as stack:
        assert ahead._start(4, stack) == started


NONE_STARTS = """
import errno, sys
sys.path.append(sys.argv.pop())
from tests.refusal import Refusal, refuse
from sterna.cli import main
for call in ("vfork", "clone"):
    refuse(Refusal(call, errno.EAGAIN))
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_where_no_process_can_be_started_that_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = [sys.executable, "-c", NONE_STARTS, "run", "--memory", "16M", "--kernel", "clock"]
    done = subprocess.run(
        [*program, str(Path(refusal.__file__).parents[1])], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"sterna: compiling kernels \(once\): 0 of \d+\n"
        r"sterna: error: kernels cannot be compiled: no process can be started: Resource temporarily unavailable\n",
        done.stderr,
    )


BAD = """
from sterna.jit.ahead import fetch_kernels
from sterna.jit.kernel import KernelError
import bad
try:
    fetch_kernels()
except KernelError as error:
    print(error)
else:
    raise AssertionError
"""


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_a_kernel_that_cannot_be_compiled_is_an_error_that_names_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "bad.py").write_text(
        "from sterna.jit.kernel import kernel\n\n@kernel()\ndef wrong(x: int) -> int:\n    return x.nothing\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{Path(sterna.__file__).parent.parent}{os.pathsep}{tmp_path}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "Unknown attribute 'nothing'" in run(BAD)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_results_that_python_would_get_wrong_are_refused() -> None:
    @kernel(ahead=False)
    def unsigned(x: int) -> tuple[int, np.uint64]:
        return x, np.uint64(1) << np.uint64(63)

    with pytest.raises(KernelError, match="which compiled code cannot give to Python"):
        unsigned(1)


WAITS = """
import fcntl
from sterna.jit import kernelcache
from sterna.memory import bitmap
from sterna.jit.ahead import fetch_kernels
told = []
def tell(text):
    told.append(text)
    if len(told) == 3:
        raise KeyboardInterrupt
with kernelcache.opened() as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        fetch_kernels(tell)
    except KeyboardInterrupt:
        assert set(told) == {"another process is compiling kernels: waiting for it"}
    else:
        raise AssertionError(told)
told[:] = []
fetch_kernels(told.append)
assert told[-1] == "compiling kernels (once): 1 of 1"
"""


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_who_waits_for_another_that_compiles_can_be_interrupted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(WAITS)


ENDLESS = """
import os, signal, threading
from pathlib import Path
from sterna.memory import bitmap
from sterna.jit.ahead import fetch_kernels
told = []
checked = 0
def check():
    global checked
    checked += 1
    if checked == 1:  # the kernel that is being compiled takes for ever
        for compiler in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split():
            os.kill(int(compiler), signal.SIGSTOP)
    if checked == 3:
        raise KeyboardInterrupt
try:
    fetch_kernels(told.append, check)
except KeyboardInterrupt:
    assert told == ["compiling kernels (once): 0 of 1"], told
else:
    raise AssertionError(told)
"""


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_a_kernel_that_takes_long_can_be_interrupted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(ENDLESS)


BEGUN = """
from sterna.stream.xbzrle import changes
from sterna.stage2 import tables
from sterna.analysis import counts
from sterna.stream.ram import records
from sterna.jit.ahead import fetch_kernels
fetch_kernels(lambda text: print(text, flush=True))
"""


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_that_is_killed_while_it_compiles_leaves_nothing(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", BEGUN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("compiling kernels (once): 0 of ")
        assert process.stdout.readline().startswith("compiling kernels (once): 1 of ")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        with contextlib.ExitStack() as stack:
            ends = [os.pidfd_open(int(child)) for child in children]
            for end in ends:
                stack.callback(os.close, end)
            process.send_signal(number)
            assert process.wait() == -number
            for end in ends:
                assert select.select([end], [], [], 300)[0], "a compiler goes on"
        assert ends
        assert process.stderr.read() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert list((tmp_path / "cache/sterna-kernels").glob(".*")) == []


CHANGED = """
import sys
from pathlib import Path
import toy
from sterna.jit.ahead import fetch_kernels
Path(toy.__file__).write_text(Path(toy.__file__).read_text().replace("+ 1", "+ 2"))
fetch_kernels()
assert toy.more(1) == 2, "what this program has loaded"
"""
AFTERWARDS = """
import toy
assert toy.more(1) == 3
"""


@pytest.mark.slow
@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_a_program_whose_sources_change_runs_what_it_has_loaded_and_leaves_it_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy.py").write_text(
        "from sterna.jit.kernel import kernel\n\n@kernel()\ndef more(x: int) -> int:\n    return x + 1\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{Path(sterna.__file__).parent.parent}{os.pathsep}{tmp_path}")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(CHANGED)
    run(AFTERWARDS)


def _weigh(
    words: Annotated[NDArray[np.uint64], 2], some: Annotated[Bytes, READONLY], by: int, twice: bool
) -> int:
    total = 0
    for i in range(words.shape[0]):
        for j in range(words.shape[1]):
            total += int(words[i, j]) * (3 * i + j + 1)
    for i in range(some.size):
        total += by * some[i]
    return 2 * total if twice else total


weigh = Kernel(_weigh)
"""Not among those that are compiled ahead: other processes need not find this module."""


def weighed(words: NDArray[np.uint64], some: Bytes, by: int, twice: bool) -> int:
    factors = np.arange(words.shape[0])[:, None] * 3 + np.arange(words.shape[1]) + 1
    total = int((words * factors.astype(words.dtype)).sum()) + by * int(some.sum())
    return 2 * total if twice else total


WORDS = np.arange(12, dtype=np.uint64).reshape(3, 4)
SOME = np.arange(7, dtype=np.uint8)


class Derived(np.ndarray[Any, Any]):
    """An array of another type."""


@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
@pytest.mark.parametrize(
    ("arguments", "straight"),
    [
        ((WORDS, SOME, 5, True), True),
        ((WORDS[1:], SOME[2:], -5, False), True),
        ((WORDS[:0], SOME[:0], 5, False), True),
        ((WORDS, np.frombuffer(b"abc", dtype=np.uint8), -(1 << 40), False), True),
        ((WORDS[:, ::2], SOME, 5, True), False),
        ((WORDS.T, SOME, 5, True), False),
        ((WORDS, SOME[::-1], 5, True), False),
        ((WORDS.astype(np.int64), SOME, 5, True), False),
        ((WORDS, SOME.astype(np.uint16), 5, True), False),
        ((WORDS.view(Derived), SOME, 5, True), False),
        ((WORDS, SOME, np.int64(5), True), False),
        ((WORDS, SOME, 5, 1), False),
        ((WORDS, SOME, True, True), False),
    ],
)
def test_arrays_are_taken_as_they_are_where_they_are_as_expected_and_taken_apart_where_not(
    arguments: tuple[Any, ...], straight: bool
) -> None:
    assert (weigh.code(weigh.expected).enter(arguments) is not NotImplemented) == straight
    assert weigh(*arguments) == weighed(*arguments)


@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_what_is_no_array_or_no_number_for_c_is_not_taken_straight() -> None:
    enter = weigh.code(weigh.expected).enter
    for arguments in ((WORDS[0], SOME, 5, True), ([1, 2], SOME, 5, True), (WORDS, None, 5, True)):
        assert enter(arguments) is NotImplemented
    for number in (1 << 63, -(1 << 63) - 1, 1 << 70, 5.0, None):
        assert enter((WORDS, SOME, number, True)) is NotImplemented


@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
def test_a_call_keeps_no_array() -> None:
    some = SOME.copy()
    before = sys.getrefcount(some)
    for _ in range(3):
        weigh(WORDS, some, 1, True)
    assert sys.getrefcount(some) == before


@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
@pytest.mark.parametrize("number", [-(1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64])
def test_an_integer_that_does_not_fit_is_refused(number: int) -> None:
    weigh.code(weigh.expected)
    codes = len(weigh._code)
    with pytest.raises(KernelError, match=f"weigh: {number:#x} does not fit int64"):
        weigh(WORDS, SOME, number, True)
    assert len(weigh._code) == codes


@pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")
@pytest.mark.parametrize("number", [-(1 << 63), (1 << 63) - 1])
def test_the_least_and_the_greatest_integer_are_taken(number: int) -> None:
    assert weigh(WORDS[:0], SOME[:2], number, False) == number
