"""Runs inside the host while it is built: imports what programs there will, so that Python compiles it, and writes the compiled
modules to standard output as an archive.
"""

import contextlib
import importlib
import sys
import tarfile
import tempfile
from pathlib import Path

MODULES = (
    *(
        "argparse",
        "asyncio",
        "concurrent.futures",
        "ctypes.util",
        "fcntl",
        "graphlib",
        "json",
        "logging",
        "mmap",
    ),
    *(
        "multiprocessing",
        "pdb",
        "resource",
        "signal",
        "socket",
        "statistics",
        "subprocess",
        "tempfile",
        "unittest.mock",
    ),
    *(
        "click",
        "elftools.elf.elffile",
        "fdt",
        "hypothesis.strategies",
        "hypothesis.stateful",
        "msgspec",
        "numpy",
    ),
    *("pytest", "qemu.qmp", "rich.console", "rich.live", "rich.progress", "rich.table", "xxhash"),
)


def main() -> None:
    """Compile and write."""
    import pytest

    for module in MODULES:
        importlib.import_module(module)
    # The test runner imports more when it runs; what it says goes to standard error.
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(sys.stderr):
        pytest.main(["--collect-only", "-q", empty])
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
        for path in sorted(Path("/usr/lib").rglob("*.pyc")):
            archive.add(path)


if __name__ == "__main__":
    main()
