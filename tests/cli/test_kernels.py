"""Compiled code is at hand before a migration needs it: a guest that stands still would wait for it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sterna.cli.errors import ExitCode
from sterna.jit.kernel import COMPILED
from sterna.launch.errors import Unsupported
from sterna.testbed.kind import KindOptions
from sterna.testbed.kinds import VM_KINDS

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent.parent

PROGRAM = """
import json, sys
from tests.migration.pairs import TCP, hosts, source_guest, waiting_guest
from sterna.cli.kernels import prepare_kernels
from sterna.jit import code

prepare_kernels()
late = []
fetch = code.fetch
def noted(kernel, key):
    late.append(f"{kernel.name} {key}")
    return fetch(kernel, key)
code.fetch = noted
for multifd in (False, True):
    with hosts(source_guest(700, steps_per_harvest=350), waiting_guest(700)) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities({"multifd": multifd})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.verified, info.error
assert late or "numba" not in sys.modules
print(json.dumps(late))
"""


HEARD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from sterna.cli import main
main(sys.argv[1:])
"""
"""The command line where none of its signals is ignored."""


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is compiled")
def test_a_migration_fetches_none() -> None:
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=TESTS.parent, capture_output=True, text=True, timeout=600
    )
    assert program.returncode == 0, program.stderr
    assert json.loads(program.stdout.splitlines()[-1]) == []


NO_MORE = """
from sterna.jit import code
def refused(kernel, key):
    raise AssertionError(f"{kernel.name} {key}")
code.fetch = refused
"""
ONE_ENTRY = f"""
import numpy as np
from sterna.cli.kernels import prepare_kernels
prepare_kernels("kvm")
{NO_MORE}
from sterna.hypervisor.kvm import dirtyring
entries = np.zeros((8, 4), dtype=np.uint32)
entries[7] = 1, 2, 5, 0
flags, slots, offsets = entries[:, 0], entries[:, 1], entries[:, 2:].view(np.uint64)[:, 0]
words = np.zeros(1, dtype=np.uint64)
for part in (slice(6, 8), slice(7, 8)):
    assert dirtyring._count_new(flags[part]) == part.start - 6
    assert dirtyring._mark(slots[part], offsets[part], 2, words, 64) == 1
assert words == 1 << 5
"""
COMPRESSED = f"""
from io import BytesIO
import numpy as np
from sterna.cli.kernels import prepare_survey_kernels
prepare_survey_kernels()
{NO_MORE}
from sterna.stream.ram.setup import ram_setup
from sterna.analysis.ram_survey import RamSurveyor
from sterna.stream.reader import StreamReader
surveyor = RamSurveyor(12, True)
surveyor.read_setup(StreamReader(BytesIO(ram_setup([("ram", 8192)]))))
surveyor.begin_epoch(0)
for data in (bytes(4096), bytearray(4096)):  # as a decompressor gives it, and as it is read
    surveyor.take_packet("ram", np.zeros(1, dtype=np.int64), data, 4096)
"""


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is compiled")
@pytest.mark.parametrize("program", [ONE_ENTRY, COMPRESSED], ids=["a ring's one entry", "compressed pages"])
def test_arrays_that_come_now_and_then_need_no_code_of_their_own(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


GLANCE = """
from sterna.cli import kernels
asked = []
kernels.prepare_kernels = lambda *_: asked.append(True)
kernels.compile_kernels()
print(len(asked))
"""


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is compiled")
def test_another_compiler_compiles_again(tmp_path: Path) -> None:
    def asked(**settings: str) -> int:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **settings}
        return int(
            subprocess.run([sys.executable, "-c", GLANCE], env=environment, capture_output=True).stdout
        )

    assert [asked(), asked(), asked(NUMBA_OPT="1"), asked(NUMBA_OPT="1")] == [1, 0, 1, 0]


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is compiled")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--kernel", "clock", "--serial", "unix:serial", "--qmp", "unix:socket,server"),
        ("stream", "proxy", "unix:socket", "unix:destination"),
    ],
)
def test_a_signal_meanwhile_leaves_no_socket(
    arguments: tuple[str, ...], number: signal.Signals, tmp_path: Path
) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", HEARD, *arguments],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stderr is not None
        assert "compiling kernels" in program.stderr.readline()
        assert (tmp_path / "socket").is_socket()
        program.send_signal(number)
        assert program.stderr.read() == "sterna: error: interrupted\n"
    assert program.returncode == 130
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


PREPARED = """
import sys
from sterna.cli.testbedrun import _prepare
from sterna.testbed.kind import KindOptions
from sterna.testbed.kinds import VM_KINDS
_prepare(VM_KINDS.get(sys.argv[1])(KindOptions()))
"""
"""What a test bed does before its first scenario."""


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is compiled")
@pytest.mark.parametrize(
    "command",
    [
        (HEARD, "doctor"),
        (HEARD, "stream", "info", "file"),
        (HEARD, "stream", "verify", "file"),
        (HEARD, "stream", "diff", "file", "file"),
        (PREPARED, "emulated"),
        (PREPARED, "kvm"),
        (PREPARED, "qemu"),
    ],
    ids=lambda command: " ".join(command[1:]),
)
def test_who_compiles_says_so(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with subprocess.Popen(
        [sys.executable, "-c", *command],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stderr is not None
        assert "compiling kernels" in program.stderr.readline()
        program.kill()


ONE_PACKAGE_LESS = """
import sys
sys.modules[sys.argv[1]] = None
from sterna.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("package", ["numba", "unicorn"])
@pytest.mark.parametrize("command", [("run", "--kernel", "clock"), ("demo",), ("bench", "--only", "sterna")])
def test_a_package_that_is_missing_is_named(package: str, command: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONE_PACKAGE_LESS, package, *command],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stderr == (
        f"sterna: error: accel emulated: the Python package {package} is missing: pip install {package}\n"
    )
    assert done.returncode == ExitCode.UNSUPPORTED


@pytest.mark.parametrize("package", ["numba", "unicorn"])
def test_a_test_bed_skips_what_a_missing_package_keeps_from_running(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unsupported, match=f"the Python package {package} is missing"):
        VM_KINDS.get("emulated")(KindOptions()).check()


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is compiled")
@pytest.mark.parametrize("command", [("run", "--kernel", "clock"), ("demo",), ("stream", "info", "file")])
@pytest.mark.parametrize("package", ["numba", "llvmlite"])
def test_a_package_that_does_not_load_is_named(
    package: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    """Also by the processes that compile."""
    (tmp_path / "file").touch()
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / f"{package}.py").write_text("raise ImportError('it needs another numpy')\n")
    path = os.pathsep.join([str(packages), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "sterna", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("sterna: compiling kernels")]
    assert said == [
        "sterna: error: the Python package numba does not load: it needs another numpy; pip install --upgrade numba"
    ]
    assert done.returncode == ExitCode.UNSUPPORTED
