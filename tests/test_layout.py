"""The project's own shape: names in strings lead somewhere, imports make no circle, documents name what is there."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "sterna"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCUMENTS = ("ARCHITECTURE.md", "README.md", "docs/glossary.md")
TEXTS = (*DOCUMENTS, "Makefile", "pyproject.toml", "tests/mutants/known.toml")

NAME = re.compile(r"(?<![\w./-])(?:sterna|tests)(?:\.[A-Za-z_]\w*)+(?::[A-Za-z_]\w*)?(?![\w=])")
"""A module, or something in one."""
IMPORT = re.compile(r"from ((?:sterna|tests)[\w.]*) import (\w+(?:, \w+)*)")
PROGRAM = re.compile(r"(?<![\w-])-m\s+((?:sterna|tests)(?:\.\w+)*)(?![\w.])")
GROUPS = {
    f"sterna.{what}"
    for what in ("accelerators", "architectures", "boards", "devices", "policies", "vm_kinds")
}
"""Of entry points: names that lead nowhere."""
PATH = re.compile(r"`([\w./-]+(?:\.py|/))`")
ROW = re.compile(r"\| `([\w/]+)/` \| (.*) \|")

RESOLVE = """
import importlib, json, pkgutil, runpy, sys

wrong = []
modules, scripts, names = json.load(sys.stdin)
for name in modules:
    importlib.import_module(name)
for path in scripts:
    runpy.run_path(path)
for name in names:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        wrong.append(f"{name}: {error}")
print(json.dumps(wrong))
"""
"""In a process of its own: what is imported here stays in nobody's way."""
NOT_INSTALLED = {"guests/README.md", "guests/images/COMPILER"}
"""For those who change guests, in a checkout."""


def python_files() -> list[Path]:
    return [path for folder in ("src", "tests", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]


def strings(path: Path) -> Iterator[str]:
    """A file's string constants, docstrings too. Arguments in a row, such as `"-m", "sterna"`, come joined as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        parts = node.elts if isinstance(node, ast.List | ast.Tuple) else []
        parts = node.args if isinstance(node, ast.Call) else parts
        words = [part.value for part in parts if isinstance(part, ast.Constant)]
        yield " ".join(word for word in words if isinstance(word, str))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All that may name a module."""
    found = [text for path in python_files() for text in strings(path)]
    return found + [(ROOT / name).read_text() for name in TEXTS]


def module_names(package: Path, base: Path) -> list[str]:
    files = package.rglob("*.py")
    return sorted(
        ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__") for path in files
    )


def resolve(modules: list[str], scripts: list[str], names: list[str]) -> list[str]:
    """Import all these modules, load these scripts, and look for these names: what is not there."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE],
        input=json.dumps([modules, scripts, names]),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        timeout=300,
        check=False,
    )
    assert not done.returncode, done.stderr
    wrong: list[str] = json.loads(done.stdout)
    return wrong


@pytest.mark.slow
def test_all_that_a_string_names_is_there(texts: list[str]) -> None:
    names = {name for text in texts for name in NAME.findall(text)} - GROUPS
    names |= {
        f"{module}:{name}"
        for text in texts
        for module, found in IMPORT.findall(text)
        for name in found.split(", ")
    }
    assert len(names) > 100  # else it is no more seen where they are
    modules = [name for name in module_names(PACKAGE, PACKAGE.parent) if not name.endswith("__main__")]
    scripts = [str(path) for path in sorted((ROOT / "bench").glob("*.py"))]
    assert resolve(modules, scripts, sorted(names)) == []


def test_a_name_that_is_not_there_is_found() -> None:
    there, nothing = "sterna.ownership", ".".join(["sterna", "nothing", "here"])
    assert resolve([], [], [there, f"{there}:Hold"]) == []
    [module, name] = resolve([], [], [nothing, f"{there}:nobody"])
    assert module.startswith(f"{nothing}: ")
    assert name.startswith(f"{there}:nobody: ")


@pytest.mark.slow
def test_what_python_is_to_run_is_a_program(texts: list[str]) -> None:
    programs = {name for text in texts for name in PROGRAM.findall(text)}
    assert "sterna" in programs
    for name in sorted(programs):
        base = ROOT if name.startswith("tests") else ROOT / "src"
        path = base.joinpath(*name.split("."))
        if not (path / "__main__.py").is_file():
            assert '\nif __name__ == "__main__":\n' in path.with_suffix(".py").read_text(), name


def test_imports_go_round_in_no_circle() -> None:
    import grimp

    graph = grimp.build_graph("sterna", cache_dir=None)
    order = TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules})
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def folders() -> set[str]:
    """Those of the package that have modules, from `src/sterna` on."""
    return {
        path.parent.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.parent != PACKAGE
    }


def rows() -> dict[str, str]:
    """ARCHITECTURE's list of folders: what is said of each."""
    section = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## Folders\n")[2].partition("\n## ")[0]
    return dict(ROW.findall(section))


def test_every_folder_is_in_the_list_of_folders() -> None:
    """By a line of its own, or as `name/` in that of the folder that it is in."""
    lines = rows()
    for folder in sorted(folders() - set(lines)):
        above = folder
        while above and above not in lines:
            above = above.rpartition("/")[0]
        assert f"`{folder.rpartition('/')[2]}/`" in lines.get(above, ""), (
            f"ARCHITECTURE.md says nothing of {folder}/"
        )


def test_the_list_of_folders_names_only_folders_that_are_there() -> None:
    there = folders()
    assert len(rows()) > 10
    for folder, text in rows().items():
        assert folder in there, f"ARCHITECTURE.md says something of {folder}/, which is not there"
        for name in re.findall(r"`(\w+)/`", text):
            inside = [one for one in there if one.startswith(f"{folder}/")]
            assert any(one.rpartition("/")[2] == name for one in inside), f"{folder}/ has no {name}/"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_that_are_there(document: str) -> None:
    """By their path from the root, or by the end of it."""
    files = {path.relative_to(ROOT).as_posix() for path in python_files()}
    folders = {f"{parent.as_posix()}/" for path in files for parent in Path(path).parents}
    known = {f"/{name}" for name in files | folders}
    named = set(PATH.findall((ROOT / document).read_text()))
    assert [name for name in sorted(named) if not any(one.endswith(f"/{name}") for one in known)] == []


def test_all_that_is_no_module_is_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["sterna"]
    matched = {pattern: set(PACKAGE.glob(pattern)) for pattern in patterns}
    assert [pattern for pattern, found in matched.items() if not found] == []
    installed = set().union(*matched.values(), PACKAGE.rglob("*.py"))
    # Other processes of the tests leave byte code meanwhile.
    left = {
        path.relative_to(PACKAGE).as_posix()
        for path in set(PACKAGE.rglob("*")) - installed
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert left == NOT_INSTALLED


def test_every_folder_of_modules_is_a_package() -> None:
    """Without __init__.py setuptools would leave it out of a wheel."""
    assert [folder for folder in sorted(folders()) if not (PACKAGE / folder / "__init__.py").is_file()] == []
