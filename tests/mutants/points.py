"""Mutation points: every place of a source file where one small change makes another program."""

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
_NEGATED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
"""Comparisons whose counterpart is their negation: a condition of one such is not negated once more."""
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"),
}
_SYMMETRIC = {"min", "max", "isinstance", "cast", "gcd"}
"""Calls whose first two arguments are not swapped: it changes nothing, or nothing but an error's kind."""


@dataclass(frozen=True)
class Point:
    """One change to one file.

    :ivar path: of the file, from the project's directory
    :ivar within: qualified name of the function or class, empty at the module's level
    :ivar operator: what kind of change
    :ivar start: of what is replaced, in bytes
    :ivar end: behind it
    :ivar before: what is replaced
    :ivar after: what takes its place
    :ivar lines: the first and the last line that the change is seen in
    :ivar defines: the function that the change is in, or the name that is given a value outside of functions
    :ivar nth: among those of the file that read alike
    """

    path: str
    within: str
    operator: str
    start: int
    end: int
    before: str
    after: str
    lines: tuple[int, int]
    defines: str = ""
    nth: int = 0

    @property
    def runs(self) -> bool:
        """Whether it is in a function: what is not runs once, when the module is imported."""
        return bool(self.within) and self.within.rpartition(".")[2] == self.defines

    @property
    def name(self) -> str:
        """The same as long as the function's text is, wherever in the file it stands."""
        change = " ".join(f"{self.before} => {self.after}".split())
        return f"{self.path}: {self.where}: {self.operator}: {change}" + f" #{self.nth}" * (self.nth > 0)

    @property
    def where(self) -> str:
        """The function, or what is defined outside of one."""
        return (
            self.within
            if self.runs
            else ".".join(part for part in (self.within, self.defines) if part) or "module"
        )

    def apply(self, source: bytes) -> bytes:
        """The changed file."""
        return source[: self.start] + self.after.encode() + source[self.end :]


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes) -> None:
        self.points: list[Point] = []
        self._path = path
        self._source = source
        sizes = itertools.accumulate((len(line) for line in source.splitlines(keepends=True)), initial=0)
        self._line_starts = list(sizes)
        self._scope: list[str] = []
        self._returns: list[ast.expr | None] = []
        self._lines = (1, 1)
        self._defines = ""

    # -- text ----------------------------------------------------------------------------------------------------

    def _at(self, line: int, column: int) -> int:
        return self._line_starts[line - 1] + column

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)

    def _text(self, start: int, end: int) -> str:
        return self._source[start:end].decode()

    def _add(self, operator: str, start: int, end: int, after: str) -> None:
        before = self._text(start, end)
        self.points.append(
            Point(
                self._path,
                ".".join(self._scope),
                operator,
                start,
                end,
                before,
                after,
                self._lines,
                self._defines,
            )
        )

    def _replace(self, operator: str, node: ast.expr | ast.stmt, after: str) -> None:
        self._add(operator, *self._span(node), after)

    def _between(self, operator: str, left: ast.expr, right: ast.expr, found: str, after: str) -> None:
        """Replace the operator that stands between two operands. The change is told with both, so that it can be read."""
        start, end = self._span(left)[0], self._span(right)[1]
        gap = self._span(left)[1], self._span(right)[0]
        text = self._text(*gap)
        match = re.search(found, re.sub("#.*", lambda comment: " " * len(comment.group()), text))
        if match is not None:
            head, tail = self._text(start, gap[0]), self._text(gap[1], end)
            self._add(operator, start, end, head + text[: match.start()] + after + text[match.end() :] + tail)

    def _condition(self, test: ast.expr) -> None:
        """Negate what decides, unless another operator does just that."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], _NEGATED):
            return
        if isinstance(test, ast.Constant):
            return
        self._replace("condition", test, f"not ({self._text(*self._span(test))})")

    # -- statements ----------------------------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> None:
        outer = self._lines
        if isinstance(node, ast.stmt | ast.match_case | ast.ExceptHandler):
            # Of what has a body only the head is its own.
            first = node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno
            body = getattr(node, "body", None) or getattr(node, "cases", None)
            last = first if body else node.end_lineno  # type: ignore[union-attr]
            if body and isinstance(body[0], ast.stmt):
                last = body[0].lineno - 1
            self._lines = (first, max(first, last or first))
        if isinstance(node, ast.stmt) and not self._returns:
            self._defines = _named(node)
        super().visit(node)
        self._lines = outer

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer = self._defines
        self._defines = "" if self._returns else node.name
        for default in [
            *node.args.defaults,
            *(value for value in node.args.kw_defaults if value is not None),
        ]:
            self.visit(default)
        self._scope.append(node.name)
        self._returns.append(node.returns)
        self._defines = node.name
        for statement in node.body:
            self.visit(statement)
        self._returns.pop()
        self._scope.pop()
        self._defines = outer

    visit_FunctionDef = _function
    visit_AsyncFunctionDef = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._scope.pop()

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self._condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Left alone: it says what is always so."""

    def visit_Raise(self, node: ast.Raise) -> None:
        """Removed; the wording of errors is left alone."""
        if node.exc is not None:
            self._replace("statement", node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._replace("statement", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self._replace("statement", node, "pass")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace("statement", node, "pass")
        if type(node.op) in _ARITHMETIC:
            symbol, other = _ARITHMETIC[type(node.op)]
            self._between("arithmetic", node.target, node.value, re.escape(symbol) + "=", other + "=")
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        self._replace("statement", node, "pass")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace("statement", node, "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self._replace("statement", node, "pass")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None:
            self._replace("statement", node, "pass")
            return
        kind = ast.unparse(annotation) if self._returns and (annotation := self._returns[-1]) else ""
        text = self._text(*self._span(node.value))
        if not isinstance(node.value, ast.Constant | ast.Compare):
            changed = {"bool": f"not ({text})", "int": f"({text}) + 1"}.get(kind, "None")
            self._replace("return", node.value, changed)
        self.generic_visit(node)

    # -- expressions ---------------------------------------------------------------------------------------------

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._condition(test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, kind, right in zip(
            [node.left, *node.comparators], node.ops, node.comparators, strict=False
        ):
            symbol, other = _COMPARISONS[type(kind)]
            self._between("comparison", left, right, symbol, other)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        symbol, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in itertools.pairwise(node.values):
            self._between("boolean", left, right, symbol, other)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        # Texts and lists are joined by a plus that no other sign takes the place of.
        joined = any(
            isinstance(side, ast.JoinedStr | ast.List | ast.ListComp) for side in (node.left, node.right)
        )
        texts = any(
            isinstance(side, ast.Constant) and isinstance(side.value, str | bytes)
            for side in (node.left, node.right)
        )
        if type(node.op) in _ARITHMETIC and not joined and not texts:
            symbol, other = _ARITHMETIC[type(node.op)]
            self._between("arithmetic", node.left, node.right, re.escape(symbol), other)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            start, end = self._span(node)
            self._add("condition", start, end, self._text(start + 3, end).lstrip())
        elif isinstance(node.op, ast.USub | ast.Invert):
            start, end = self._span(node)
            self._add("arithmetic", start, end, self._text(start + 1, end))
        if not isinstance(node.operand, ast.Constant) or isinstance(node.op, ast.Not):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        if called == "TypeVar":
            return
        if len(node.args) >= 2 and called not in _SYMMETRIC:
            first, second = node.args[:2]
            one, two = self._text(*self._span(first)), self._text(*self._span(second))
            if not any(isinstance(side, ast.Starred) for side in (first, second)) and one != two:
                start, end = self._span(first)[0], self._span(second)[1]
                gap = self._text(self._span(first)[1], self._span(second)[0])
                self._add("arguments", start, end, two + gap + one)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            self._replace("constant", node, str(node.value + 1))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Left alone: wording."""


def _named(statement: ast.stmt) -> str:
    """The name that a statement gives a value, where it is one."""
    targets = (
        statement.targets
        if isinstance(statement, ast.Assign)
        else [statement.target]
        if isinstance(statement, ast.AnnAssign)
        else []
    )
    names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return names[0] if names else ""


def points_in(path: str, source: bytes) -> list[Point]:
    """All mutation points of a file, in the order of its text.

    Left alone are annotations, decorators, assertions, the wording of errors and what is formatted.
    """
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    seen: Counter[str] = Counter()
    points = []
    for point in sorted(
        finder.points, key=lambda point: (point.start, point.end, point.operator, point.after)
    ):
        points.append(replace(point, nth=seen[point.name]))
        seen[point.name] += 1
    return points


def files_of(root: Path, folder: str, left_out: tuple[str, ...] = ()) -> Iterator[str]:
    """The source files of a folder, as paths from the project's directory."""
    for path in sorted((root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not any(name == other or name.startswith(f"{other}/") for other in left_out):
            yield name
