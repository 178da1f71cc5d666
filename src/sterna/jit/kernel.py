"""Compiled kernels: machine code made from Python, which runs without the GIL.

`@kernel()` has the decorated function compiled. Where numba is missing it runs as it is written, so that everything that is not
emulation works without a compiler. What would take too long so, as a loop over the bytes of a page does, or what only compiled
code can call, is in small functions that others call, and these have a plain twin: `@kernel(twin=f)`.

A kernel is fetched upon its first call, as object code that an earlier program left (`sterna.jit.kernelcache`): numba, which
takes longer to load than all else, is loaded only where there is none yet. What a kernel is compiled for is told by the arguments
it is called with; what it will be called with, by its annotations, so that it can be compiled ahead.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

import numpy as np

from sterna.jit.machinecode import INT64_MAX, INT64_MIN, Code
from sterna.jit.source import FLAGS, KernelSource, Key, names_in
from sterna.jit.source import READONLY as READONLY
from sterna.jit.source import STRIDED as STRIDED
from sterna.jit.source import KernelError as KernelError
from sterna.jit.source import Late as Late
from sterna.jit.source import NoCompilerError as NoCompilerError
from sterna.jit.source import loading as loading

F = TypeVar("F", bound=Callable[..., Any])

COMPILED = importlib.util.find_spec("numba") is not None

_fetching = threading.RLock()


class Kernel(KernelSource):
    """A compiled function, to be called."""

    def __init__(
        self,
        function: Callable[..., Any],
        twin: Callable[..., Any] | None = None,
        **options: bool,
    ) -> None:
        functools.update_wrapper(self, function)
        super().__init__(function, twin, **options)
        self._code: dict[Key, Code] = {}
        self._usual: Code | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Run its machine code.

        :raise KernelError: When an integer does not fit int64, it fails, or it cannot be compiled.
        """
        if self._usual is not None and (result := self._usual.enter(arguments)) is not NotImplemented:
            return result
        key: list[Any] = []
        words: list[int] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                key.append((argument.dtype, argument.ndim, argument.flags.num & FLAGS))
                words += (0, 0, argument.size, argument.itemsize, argument.ctypes.data)
                words += argument.shape
                words += argument.strides
            elif isinstance(argument, np.generic):
                key.append(argument.dtype)
                words.append(int(argument))
            else:
                if not INT64_MIN <= argument <= INT64_MAX:
                    raise KernelError(f"{self.name}: {argument:#x} does not fit int64")
                key.append(bool if isinstance(argument, bool) else int)
                words.append(argument)
        code = self._code.get(tuple(key))
        return (self.code(tuple(key)) if code is None else code)(words)

    def find(self) -> bool:
        """Fetch what is expected to be called: whether it is there.

        :raise NoCompilerError: When it cannot even be looked for.
        """
        with _fetching:
            if self.expected not in self._code:
                with loading():
                    from sterna.jit.code import find

                code = find(self, self.expected)
                if code is None:
                    return False
                self._keep(self.expected, code)
            return True

    def code(self, key: Key) -> Code:
        """Its machine code for these arguments, from the disk if it is there.

        Code for what is expected serves more: a column of one item is contiguous, and what is only read may be writeable.

        :raise KernelError: When it cannot be compiled.
        """
        with _fetching:
            if key not in self._code:
                with loading():
                    from sterna.jit.code import fetch

                served = self.ahead and key != self.expected and _serves(self.expected, key)
                self._keep(key, self.code(self.expected) if served else fetch(self, key))
            return self._code[key]

    def _keep(self, key: Key, code: Code) -> None:
        self._code[key] = code
        if self.ahead and key == self.expected:
            self._usual = code

    @property
    def address(self) -> int:
        """Of its machine code, for what it is expected to be called with."""
        return self.code(self.expected).address


def _serves(expected: Key, key: Key) -> bool:
    """Whether code for what is expected takes these arguments as they are."""
    return len(expected) == len(key) and all(
        part[:2] == wanted[:2] and part[2] & wanted[2] == wanted[2]
        if isinstance(part, tuple) and isinstance(wanted, tuple)
        else part == wanted
        for part, wanted in zip(key, expected, strict=True)
    )


_ahead: list[Kernel] = []


def kernels_ahead() -> list[Kernel]:
    """The kernels that the modules imported so far may call from Python."""
    return list(_ahead)


def _noted(made: Kernel) -> Kernel:
    if made.ahead:
        _ahead.append(made)
    return made


def hook(function: Callable[..., None]) -> Kernel:
    """Compile the decorated function for C libraries to call, at the `address` of the result. Its arguments are integers or
    pointers, each in a register; it returns nothing.
    """
    return _noted(Kernel(function, hook=True))


@overload
def kernel(*, twin: F, ahead: bool = ..., inline: bool = ...) -> Callable[[F], F]: ...


@overload
def kernel(*, ahead: bool = ..., inline: bool = ...) -> Callable[[F], F]: ...


def kernel(
    *, twin: Callable[..., Any] | None = None, ahead: bool = True, inline: bool = False
) -> Callable[[F], F]:
    """Compile the decorated function (kept on disk, GIL released). Where numba is missing, `twin` takes its place, or else the
    function itself, unless it names what only compiled code has.

    The plain function stays reachable as the attribute `twin` of the result. Compiled functions may not allocate memory.

    :param ahead: it is called from Python, with what its annotations say
    :param inline: make it a part of the compiled functions that call it
    """

    def wrap(function: F) -> F:
        instead = function if twin is None else twin
        if COMPILED or (twin is None and _is_for_compiled_code(function)):
            return cast(F, _noted(Kernel(function, instead, ahead=ahead, inline=inline)))
        instead.twin = instead  # type: ignore[attr-defined]
        return cast(F, instead)

    return wrap


def _is_for_compiled_code(function: Callable[..., Any]) -> bool:
    found = (function.__globals__.get(name) for name in names_in(function.__code__))
    return any(isinstance(one, Kernel) or (isinstance(one, Late) and one.plain is None) for one in found)
