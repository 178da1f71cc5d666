"""Compiled code leaves no trace of the lines it runs: its tests are those that run the Python lines which name it.

A name leads to the lines that name it; where those are compiled as well, or give it another name, on from there.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.record import Recorded

_NOWHERE = 0
"""Line of what runs when a module is imported, which is no test's doing."""


@dataclass(frozen=True)
class _Mention:
    path: str
    line: int
    within: str
    """The function that names it, or what is defined by it at the level of the module; else empty."""


def _mentions(path: str, tree: ast.AST, within: str = "") -> Iterator[tuple[str, _Mention]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        inner = within
        if not within and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = node.name
        elif not within and isinstance(node, ast.Assign):
            names = [
                name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            ]
            for name in names:
                for other in ast.walk(node.value):
                    if isinstance(other, ast.Name | ast.Attribute):
                        called = other.id if isinstance(other, ast.Name) else other.attr
                        yield called, _Mention(path, _NOWHERE, name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id, _Mention(path, node.lineno, inner)
        elif isinstance(node, ast.Attribute):
            yield node.attr, _Mention(path, node.lineno, inner)
        yield from _mentions(path, node, inner)


class Callers:
    """:param root: the project's directory"""

    def __init__(self, root: Path) -> None:
        self._mentions: dict[str, list[_Mention]] = defaultdict(list)
        for file in sorted(path for folder in ("src", "tests") for path in (root / folder).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            for name, mention in _mentions(path, ast.parse(file.read_bytes())):
                self._mentions[name].append(mention)

    def tests_of(self, name: str, recorded: Recorded) -> set[str]:
        """The tests that run a line which leads to this name."""
        found: set[str] = set()
        seen, ahead = {name}, [name]
        while ahead:
            for mention in self._mentions[ahead.pop()]:
                tests = recorded.tests_of(mention.path, range(mention.line, mention.line + 1))
                found |= tests
                if not tests and mention.within and mention.within not in seen:
                    seen.add(mention.within)
                    ahead.append(mention.within)
        return found
