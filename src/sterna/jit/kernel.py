"""Compiled kernels: machine code made from Python, which runs without the GIL, and their plain twins.

`@kernel(twin=f)` has the decorated function compiled. Where numba is missing the twin runs in its place, so that everything that
is not emulation works without a compiler. Tests compare each kernel with its twin.

A kernel is fetched upon its first call, as object code that an earlier program left (`sterna.jit.kernelcache`): numba, which
takes longer to load than all else, is loaded only where there is none yet. What a kernel is compiled for is told by the arguments
it is called with; what it will be called with, by its annotations, so that it can be compiled ahead.
"""

import ctypes
import functools
import importlib
import importlib.util
import threading
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, TypeVar, cast, overload

import numpy as np

from sterna.errors import InternalError

F = TypeVar("F", bound=Callable[..., Any])

COMPILED = importlib.util.find_spec("numba") is not None

Key = tuple[Any, ...]
"""What a kernel is compiled for, argument by argument: `int` or `bool`; a dtype for one of numpy's numbers; for an array its
dtype, its number of dimensions and its flags.
"""

CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400
"""NPY_ARRAY_C_CONTIGUOUS and so on (numpy/ndarraytypes.h)."""
_FLAGS = CONTIGUOUS | ALIGNED | WRITEABLE
STRIDED, READONLY = "strided", "read-only"
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1

_fetching = threading.RLock()


_EXCEPTION = ctypes.byref(ctypes.c_void_p())
"""Where descriptions of exceptions go. Nobody reads them: they stand in numba's terms."""


class ArrayHead(ctypes.Structure):
    """What compiled code reads of an array: PyArrayObject_fields (numpy/ndarraytypes.h), behind the head of all objects."""

    _fields_ = (
        ("references", ctypes.c_ssize_t),
        ("type", ctypes.c_size_t),
        ("data", ctypes.c_size_t),
        ("ndim", ctypes.c_int),
        ("shape", ctypes.c_size_t),
        ("strides", ctypes.c_size_t),
        ("base", ctypes.c_size_t),
        ("dtype", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


def _head_is_known() -> bool:
    """Whether this Python's and this numpy's arrays begin like `ArrayHead`."""
    if object.__basicsize__ != ArrayHead.data.offset:
        return False
    probe = np.zeros((3, 5), dtype=np.uint32)[1:, ::2]
    head = ArrayHead.from_address(id(probe))
    known = (id(np.ndarray), probe.ctypes.data, probe.ndim, id(probe.dtype), probe.flags.num)
    if (head.type, head.data, head.ndim, head.dtype, head.flags) != known:
        return False
    sizes = ctypes.c_ssize_t * probe.ndim
    found = (tuple(sizes.from_address(head.shape)), tuple(sizes.from_address(head.strides)))
    return found == (probe.shape, probe.strides)


_HEAD_IS_KNOWN = _head_is_known()


class KernelError(InternalError):
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

    :param path: ``module:name``
    :param made_of: what it depends on besides that module's file
    """

    def __init__(self, path: str, made_of: Any = None) -> None:
        self.path = path
        self.made_of = made_of
        self.module, _, self._name = path.partition(":")

    def resolve(self) -> Any:
        """The thing itself."""
        return getattr(importlib.import_module(self.module), self._name)


MISFIT = -1000
"""What the entry of a kernel returns for arrays that are not as its key says; numba's own status numbers are small."""


class Code:
    """Machine code of a kernel, for one `Key`.

    :ivar address: of its function, of numba's native calling convention: where the result goes, where an exception's
        description goes, and the arguments one after the other, an array as what manages its memory (twice nothing), number of
        items, their size, address, shape and strides. Each takes one register or one place on the stack (System V AMD64 ABI
        3.2.3; AAPCS64 6.8.2)
    :param returns: the result: ``i``, ``u`` and ``b`` are int64, uint64 and bool, several a tuple, none None
    :param entry: the address of a function that takes arrays as they are, so that Python need not take them apart: where the
        result goes, the addresses of the type of arrays and of each array's dtype, and the arguments; it returns `MISFIT` when
        an array is another than the key says. 0: there is none
    """

    def __init__(self, name: str, address: int, returns: str, key: Key, entry: int = 0) -> None:
        self.address = address
        self._name = name
        self._returns = returns
        pointer, word = ctypes.c_void_p, ctypes.c_int64
        arrays = [part for part in key if isinstance(part, tuple)]
        words = len(key) + sum(4 + 2 * ndim for _, ndim, _ in arrays)
        self._call = ctypes.CFUNCTYPE(ctypes.c_int32, pointer, pointer, *[word] * words)(address)
        self._result = (ctypes.c_uint64 if returns == "u" else word) * max(len(returns), 1)
        self._enter = None
        if entry and _HEAD_IS_KNOWN:
            kinds = [ctypes.py_object if isinstance(part, tuple) else word for part in key]
            self._enter = ctypes.CFUNCTYPE(ctypes.c_int32, pointer, pointer, *kinds)(entry)
            self._plain = tuple((at, part) for at, part in enumerate(key) if not isinstance(part, tuple))
            self._known = (ctypes.c_size_t * (1 + len(arrays)))(
                id(np.ndarray), *(id(dtype) for dtype, _, _ in arrays)
            )
            self._dtypes = [dtype for dtype, _, _ in arrays]  # What has an address must stay.

    def enter(self, arguments: tuple[Any, ...]) -> Any:
        """Run it by its entry; NotImplemented when there is none, or arguments are others than the key says."""
        if self._enter is None:
            return NotImplemented
        for at, kind in self._plain:
            argument = arguments[at]
            if type(argument) is not kind or not _INT64_MIN <= argument <= _INT64_MAX:
                return NotImplemented
        result = self._result()
        status = self._enter(result, self._known, *arguments)
        return NotImplemented if status == MISFIT else self._returned(status, result)

    def __call__(self, words: Iterable[int]) -> Any:
        """Run it with arguments that are taken apart."""
        result = self._result()
        return self._returned(self._call(result, _EXCEPTION, *words), result)

    def _returned(self, status: int, result: Any) -> Any:
        if status != 0:
            raise KernelError(f"the kernel {self._name} failed with status {status}")
        if not self._returns:
            return None
        if self._returns == "b":
            return bool(result[0] & 0xFF)
        return result[0] if len(self._returns) == 1 else tuple(result)


class Kernel:
    """A compiled function.

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
        functools.update_wrapper(self, function)
        self.function = function
        self.twin = function if twin is None else twin
        self.ahead = ahead
        self.inline = inline
        self.hook = hook
        self.name = f"{function.__module__}.{function.__qualname__}"
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
                key.append((argument.dtype, argument.ndim, argument.flags.num & _FLAGS))
                words += (0, 0, argument.size, argument.itemsize, argument.ctypes.data)
                words += argument.shape
                words += argument.strides
            elif isinstance(argument, np.generic):
                key.append(argument.dtype)
                words.append(int(argument))
            else:
                if not _INT64_MIN <= argument <= _INT64_MAX:
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
            dtype, ndim, flags = None, 1, _FLAGS
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


def _serves(expected: Key, key: Key) -> bool:
    """Whether code for what is expected takes these arguments as they are."""
    return len(expected) == len(key) and all(
        part[:2] == wanted[:2] and part[2] & wanted[2] == wanted[2]
        if isinstance(part, tuple) and isinstance(wanted, tuple)
        else part == wanted
        for part, wanted in zip(key, expected, strict=True)
    )


def names_in(code: CodeType) -> set[str]:
    """The names that a function's code looks up, and code within it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return names


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
def kernel(*, twin: F, ahead: bool = ...) -> Callable[[F], F]: ...


@overload
def kernel(*, ahead: bool = ..., inline: bool = ...) -> Callable[[F], F]: ...


def kernel(
    *, twin: Callable[..., Any] | None = None, ahead: bool = True, inline: bool = False
) -> Callable[[F], F]:
    """Compile the decorated function (kept on disk, GIL released), or use `twin` where numba is missing.

    The twin stays reachable as the attribute `twin` of the result. Compiled functions may not allocate memory.

    :param ahead: it is called from Python, with what its annotations say
    :param inline: make it a part of the compiled functions that call it
    """

    def wrap(function: F) -> F:
        if COMPILED or twin is None:
            return cast(F, _noted(Kernel(function, twin, ahead=ahead, inline=inline)))
        twin.twin = twin  # type: ignore[attr-defined]
        return cast(F, twin)

    return wrap
