"""What kernels are compiled from: functions, what else their code names, and the arguments that they will be called with."""

import functools
import importlib
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import numpy as np

from sterna.errors import Error

Key = tuple[Any, ...]
"""What a kernel is compiled for, argument by argument: `int` or `bool`; a dtype for one of numpy's numbers; for an array its
dtype, its number of dimensions and its flags.
"""

CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400
"""NPY_ARRAY_C_CONTIGUOUS and so on (numpy/ndarraytypes.h)."""
FLAGS = CONTIGUOUS | ALIGNED | WRITEABLE
STRIDED, READONLY = "strided", "read-only"


class KernelError(Error):
    """A kernel was called in a way that compiled code has not, or failed."""


class NoCompilerError(KernelError):
    """numba is installed and does not load."""


@contextmanager
def loading() -> Iterator[None]:
    """In the body of the `with` statement numba is imported, or what comes with it.

    :raise NoCompilerError: When that cannot be.
    """
    try:
        yield
    except (ImportError, OSError) as error:  # an OSError of LLVM's library
        raise NoCompilerError(
            f"the Python package numba does not load: {error}; pip install --upgrade numba"
        ) from error


class Late:
    """Something that only compiled code uses, imported when the first function that does is compiled.

    :ivar module: where it is
    :ivar plain: what does the same in functions that are not compiled; None where nothing does

    :param path: ``module:name``
    :param made_of: what it depends on besides that module's file
    """

    def __init__(self, path: str, made_of: Any = None, plain: Callable[..., Any] | None = None) -> None:
        self.path = path
        self.made_of = made_of
        self.plain = plain
        self.module, _, self._name = path.partition(":")

    def __call__(self, *arguments: Any) -> Any:
        assert self.plain is not None
        return self.plain(*arguments)

    def resolve(self) -> Any:
        """The thing itself."""
        return getattr(importlib.import_module(self.module), self._name)


class KernelSource:
    """A function that is compiled.

    :ivar function: what it is compiled from
    :ivar twin: the plain function that does the same, or the function itself
    :ivar ahead: called from Python, and so compiled ahead
    :ivar inline: made a part of the compiled functions that call it
    :ivar hook: called by C libraries
    """

    def __init__(
        self,
        function: Callable[..., Any],
        twin: Callable[..., Any] | None = None,
        *,
        ahead: bool = True,
        inline: bool = False,
        hook: bool = False,
    ) -> None:
        self.function = function
        self.twin = function if twin is None else twin
        self.ahead = ahead
        self.inline = inline
        self.hook = hook
        self.name = f"{function.__module__}.{function.__qualname__}"

    @functools.cached_property
    def expected(self) -> Key:
        """What it will be called with, by its annotations: an array is one-dimensional, contiguous and writeable where
        `Annotated` says no other, by a dtype, a number of dimensions, `STRIDED` or `READONLY`.
        """
        key: list[Any] = []
        for name, hint in typing.get_type_hints(self.function, include_extras=True).items():
            if name == "return":
                continue
            if hint in (int, bool):
                key.append(hint)
                continue
            dtype, ndim, flags = None, 1, FLAGS
            if typing.get_origin(hint) is typing.Annotated:
                for note in hint.__metadata__:
                    if isinstance(note, np.dtype):
                        dtype = note
                    elif isinstance(note, int):
                        ndim = note
                    elif note == STRIDED:
                        flags &= ~CONTIGUOUS
                    elif note == READONLY:
                        flags &= ~WRITEABLE
                hint = hint.__origin__
            if dtype is None:
                dtype = np.dtype(typing.get_args(typing.get_args(hint)[1])[0])
            key.append((dtype, ndim, flags))
        return tuple(key)


def names_in(code: CodeType) -> set[str]:
    """The names that a function's code looks up, and code within it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return names
