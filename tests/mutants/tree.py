"""A copy of the project in which one file at a time is changed, and its tests run.

Compiled kernels are kept in a directory of the copy's own. A kernel is compiled with the kernels that it calls and the constants
that it reads, wherever they stand; so a run on a changed file gets a directory without the kernels of that file and of every
module that imports it, directly or not. It is thrown away with the run: what a changed source was compiled to never comes back.
"""

import contextlib
import functools
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grimp

_KINDS = ("src", "tests")
_COPIED = (*_KINDS, "pyproject.toml", "docs", "bench")
_IGNORED = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
DATA_BYTES = 8 << 30
"""Private memory that a run may have: a changed size may be any size."""
_NO_TESTS = 5
"""Exit code of pytest."""
COLLECTION_S = 300.0
"""For importing and compiling, besides what the tests are given."""


@dataclass(frozen=True)
class Run:
    """How the tests went.

    :ivar failed: whether any did, or none could be run
    :ivar how: by a test that failed, in collection, by a crash, by a time limit
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


@functools.cache
def importers(root: Path, package: str) -> Mapping[str, frozenset[str]]:
    """Files that hold compiled code, by the file that they depend on; as paths from the project's directory."""
    sys.path.insert(0, str(root / "src"))
    try:
        graph = grimp.build_graph(package, cache_dir=None)
    finally:
        sys.path.pop(0)
    files = {}
    for module in graph.modules:
        path = Path("src", *module.split("."))
        path = path / "__init__.py" if (root / path).is_dir() else path.with_suffix(".py")
        files[module] = path.as_posix()
    return {
        path: frozenset(files[name] for name in {module, *graph.find_downstream_modules(module)})
        for module, path in files.items()
    }


class Tree:
    """:param root: the project's directory
    :param package: its package
    :param directory: where the copy is, made or brought up to date
    """

    def __init__(self, root: Path, package: str, directory: Path) -> None:
        self.path = directory / "tree"
        self._root = root
        self._package = package
        self._kernels = directory / "kernels"
        self._update()

    def _update(self) -> None:
        """Bring the copy up to date. Files that are the same keep their time stamps, by which kernels are kept."""
        wanted = set()
        changed = False
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
                    changed = changed or parts[0] == "src"
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    self._write(copy, data)
                    shutil.copymode(path, copy)
        for copy in self.path.rglob("*"):
            if copy.is_file() and copy not in wanted and copy.suffix != ".pyc":
                copy.unlink()
        if changed:
            shutil.rmtree(self._kernels, ignore_errors=True)
        self._kernels.mkdir(exist_ok=True)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        if path.suffix == ".py":
            # Byte code is told from stale by whole seconds and the size: too little for files that change so fast.
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
            py_compile.compile(str(path), quiet=2)

    @contextlib.contextmanager
    def changed(self, name: str, data: bytes) -> Iterator[Path]:
        """With the file so; the directory of compiled kernels for such a run."""
        path = self.path / name
        sound = path.read_bytes()
        self._write(path, data)
        try:
            if data == sound:
                yield self._kernels
            else:
                with tempfile.TemporaryDirectory(dir=self._kernels.parent, prefix="kernels-") as fresh:
                    self._copy_kernels(name, Path(fresh))
                    yield Path(fresh)
        finally:
            self._write(path, sound)

    def _copy_kernels(self, name: str, to: Path) -> None:
        stale = {
            (Path(path).parent.name, Path(path).stem)
            for path in importers(self._root, self._package).get(name, ())
        }
        for kept in self._kernels.rglob("*"):
            # numba names its directories FOLDER_DIGEST and its files MODULE.FUNCTION-LINE.VERSION.
            folder, module = kept.parent.name.rpartition("_")[0], kept.name.partition(".")[0]
            if kept.is_file() and (folder, module) not in stale:
                copy = to / kept.relative_to(self._kernels)
                copy.parent.mkdir(exist_ok=True, mode=0o700)
                os.link(kept, copy)  # numba replaces files, and never writes into one

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
        _, _, lines = self._pytest(["-m", "pytest", test], self._kernels, directory, None, more)
        return lines

    def run(self, plan: Sequence[tuple[str, float]], kernels: Path) -> Run:
        """Run tests until one fails.

        :param plan: the tests in order, each with its limit in seconds
        :param kernels: where compiled kernels are kept
        :raise NoTests: When pytest has run none of them.
        """
        with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
            directory = Path(scratch)
            (directory / "tests").write_text("\n".join(name for name, _ in plan))
            (directory / "plan").write_text(json.dumps(plan))
            limit = COLLECTION_S + sum(seconds for _, seconds in plan)
            command = ["-m", "pytest", "-x", f"@{directory / 'tests'}"]
            code, text, lines = self._pytest(
                command, kernels, directory, limit, {"MUTANTS_PLAN": str(directory / "plan")}
            )
        begun = [str(line["began"]) for line in lines if "began" in line]
        seconds = [float(str(line["seconds"])) for line in lines if "ended" in line]
        unfinished = begun[-1] if len(begun) > len(seconds) else ""
        for line in lines:
            if line.get("outcome") == "failed":
                return Run(True, "test", str(line["test"]), str(line["why"]), sum(seconds))
        if code is None or (unfinished and code == 1):
            return Run(True, "time limit", unfinished, "", sum(seconds))
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
        kernels: Path,
        directory: Path,
        limit: float | None,
        more: Mapping[str, str],
    ) -> tuple[int | None, str, list[dict[str, object]]]:
        report = directory / "report"
        environment = os.environ | {
            "MUTANTS_REPORT": str(report),
            "NUMBA_CACHE_DIR": str(kernels),
            # The project's own, whose names tell what they were compiled from.
            "XDG_CACHE_HOME": str(kernels),
            # The package is installed from the project's own directory; these come before it, also in tests' own processes.
            "PYTHONPATH": os.pathsep.join(str(self.path / part) for part in (*_KINDS, "")),
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
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES)),
            )
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            # Whatever tests have left running goes with them.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        return code, output.read_text(errors="replace"), lines
