"""Compiled kernels: machine code made from Python, which runs without the GIL, and their plain twins.

`@kernel(twin=f)` compiles the decorated function with numba. Where numba is missing the twin runs in its place, so that
everything that is not emulation works without a compiler. Tests compare each kernel with its twin.

A kernel is fetched upon its first call: a program that calls none does not load numba, which takes longer than the rest of it.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

COMPILED = importlib.util.find_spec("numba") is not None

_fetching = threading.RLock()


class _Kernel:
    """A kernel that may not have been called yet. What is asked of it besides is asked of numba's dispatcher.

    :ivar twin: the plain function that does the same
    """

    def __init__(self, function: Callable[..., Any], twin: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.twin = twin
        self._function = function
        self._dispatcher: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return self.dispatcher()(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dispatcher(), name)

    def dispatcher(self) -> Any:
        """What numba makes of the function. It stands in the function's module from then on, for those who call it there."""
        with _fetching:
            if self._dispatcher is None:
                from sterna.memory.compiler import numba

                names = self._function.__globals__
                # Compiled code that calls other kernels wants their dispatchers.
                for name in set(_names(self._function.__code__)):
                    if isinstance(called := names.get(name), _Kernel):
                        names[name] = called.dispatcher()
                made = numba.njit(nogil=True, cache=True)(self._function)
                made.twin = self.twin
                self._dispatcher = made
                if names.get(self._function.__name__) is self:
                    names[self._function.__name__] = made
            return self._dispatcher


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function's code looks up, and code within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def kernel(*, twin: F) -> Callable[[F], F]:
    """Compile the decorated function (cached on disk, GIL released), or use `twin` where numba is missing.

    The twin stays reachable as the attribute `twin` of the result.
    """

    def wrap(function: F) -> F:
        if COMPILED:
            return cast(F, _Kernel(function, twin))
        twin.twin = twin  # type: ignore[attr-defined]
        return twin

    return wrap
