"""A copy of the project in which one file at a time is changed, and its tests run.

Compiled kernels are kept beside the copies, for all of them: what is kept is named by the code that it was made of, the kernels
that it calls and the constants that it reads, so a changed one is compiled anew, with all that call it.
"""

import contextlib
import importlib.util
import json
import os
import py_compile
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_KINDS = ("src", "tests")
_COPIED = (*_KINDS, "pyproject.toml", "docs", "bench")
_IGNORED = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
RESIDENT_BYTES = 6 << 30
"""Memory that a run may take: a changed size may be any size. What is only mapped is not counted: each emulated CPU maps half a
gigabyte for its code.
"""
_LOOK_S = 0.2
"""Between two looks at how much it has."""
_TIMED_OUT = "Timeout ("
"""How faulthandler begins what it says."""
_NO_TESTS = 5
"""Exit code of pytest."""
COLLECTION_S = 300.0
"""For importing and compiling, besides what the tests are given."""


@dataclass(frozen=True)
class Run:
    """How the tests went.

    :ivar failed: whether any did, or none could be run
    :ivar how: by a test that failed, in collection, by a crash, by a limit to time or memory
    :ivar test: the test that saw it, where one did
    :ivar why: the last line of what it said
    :ivar seconds: all together
    """

    failed: bool
    how: str
    test: str
    why: str
    seconds: float


class NoTests(Exception):
    """pytest found nothing to run."""


def _resident_bytes(pid: int) -> int:
    """Memory that a process has by now."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError):
        return 0


class Tree:
    """:param root: the project's directory
    :param path: where the copy is, made or brought up to date
    :param cache: where compiled kernels are kept

    :ivar path: of the copy
    """

    def __init__(self, root: Path, path: Path, cache: Path) -> None:
        self.path = path
        self._root = root
        self._cache = cache
        self._update()

    def _update(self) -> None:
        """Bring the copy up to date."""
        wanted = set()
        for name in _COPIED:
            top = self._root / name
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                parts = path.relative_to(self._root).parts
                if path.is_dir() or any(_IGNORED("", [part]) for part in parts):
                    continue
                copy = self.path.joinpath(*parts)
                wanted.add(copy)
                data = path.read_bytes()
                if not copy.is_file() or copy.read_bytes() != data:
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    self._write(copy, data)
                    shutil.copymode(path, copy)
        for copy in self.path.rglob("*"):
            if copy.is_file() and copy not in wanted and copy.suffix != ".pyc":
                copy.unlink()

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        if path.suffix == ".py":
            # Byte code is told from stale by whole seconds and the size: too little for files that change so fast.
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
            py_compile.compile(str(path), quiet=2)

    @contextlib.contextmanager
    def changed(self, name: str, data: bytes) -> Iterator[None]:
        """With the file so."""
        path = self.path / name
        sound = path.read_bytes()
        self._write(path, data)
        try:
            yield
        finally:
            self._write(path, sound)

    def record(self, test: str, directory: Path) -> list[dict[str, object]]:
        """Run a file of tests with coverage recorded in the directory: the report's lines."""
        settings = directory / "coverage.ini"
        settings.write_text(
            "[run]\nparallel = true\nsigterm = true\n"
            f"include = {self.path}/*\ndata_file = {directory}/data\n"
            # Tests' own processes inherit the test that pytest is at.
            "context = ${PYTEST_CURRENT_TEST-}\n"
        )
        more = {"COVERAGE_PROCESS_START": str(settings)}
        _, _, lines = self._pytest(["-m", "pytest", test], directory, None, more)
        return lines

    def run(self, plan: Sequence[tuple[str, float]]) -> Run:
        """Run tests until one fails.

        :param plan: the tests in order, each with its limit in seconds
        :raise NoTests: When pytest has run none of them.
        """
        with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
            directory = Path(scratch)
            (directory / "tests").write_text("\n".join(name for name, _ in plan))
            (directory / "plan").write_text(json.dumps(plan))
            limit = COLLECTION_S + sum(seconds for _, seconds in plan)
            command = ["-m", "pytest", "-x", f"@{directory / 'tests'}"]
            code, text, lines = self._pytest(
                command, directory, limit, {"MUTANTS_PLAN": str(directory / "plan")}
            )
        begun = [str(line["began"]) for line in lines if "began" in line]
        seconds = [float(str(line["seconds"])) for line in lines if "ended" in line]
        unfinished = begun[-1] if len(begun) > len(seconds) else ""
        for line in lines:
            if line.get("outcome") == "failed":
                return Run(True, "test", str(line["test"]), str(line["why"]), sum(seconds))
        if code is None or (unfinished and _TIMED_OUT in text):
            return Run(True, "limit", unfinished, "", sum(seconds))
        if unfinished:
            return Run(True, "crash", unfinished, f"exit code {code}", sum(seconds))
        if code == 0:
            return Run(False, "", "", "", sum(seconds))
        if code == _NO_TESTS:
            raise NoTests(f"pytest has run none of {len(plan)} tests:\n{text[-2000:]}")
        errors = [line for line in text.splitlines() if line.startswith(("E  ", "ERROR"))]
        return Run(True, "collection", "", " ".join(errors[-1:]), sum(seconds))

    def _pytest(
        self,
        command: Sequence[str],
        directory: Path,
        limit: float | None,
        more: Mapping[str, str],
    ) -> tuple[int | None, str, list[dict[str, object]]]:
        report = directory / "report"
        environment = os.environ | {
            "MUTANTS_REPORT": str(report),
            "XDG_CACHE_HOME": str(self._cache),
            # The package is installed from the project's own directory; these come before it, also in tests' own processes.
            "PYTHONPATH": os.pathsep.join(str(self.path / part) for part in ("src", "")),
            **more,
        }
        options = ["-p", "tests.mutants.plugin", "-p", "no:cacheprovider", "-q", "--tb=line"]
        output = directory / "output"
        with output.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, *command, *options],
                cwd=self.path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        end = float("inf") if limit is None else time.monotonic() + limit
        code: int | None = None
        try:
            while code is None and time.monotonic() < end and _resident_bytes(process.pid) < RESIDENT_BYTES:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(_LOOK_S)
        finally:
            # Whatever tests have left running goes with them.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        return code, output.read_text(errors="replace"), lines
