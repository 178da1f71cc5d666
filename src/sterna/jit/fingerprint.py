"""What a kernel is compiled from and with, in one name: compiled code is found again by it, and never that of anything else.

It is made of what this program has loaded, not of files that may have changed since: the functions' code, that of the compiled
functions they call, the constants they read. Only of what the compiler loads itself are the files taken (`sources_changed`).
"""

import enum
import functools
import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from llvmlite import binding

from sterna.jit.source import KernelError, KernelSource, Key, Late, names_in

_LIBRARIES = ("numba", "llvmlite", "numpy")
_MAKERS = tuple(f"sterna.jit.{name}" for name in ("compiler", "source", "machinecode", "code"))


def fingerprint(kernel: KernelSource, key: Key) -> str:
    """Changes with all that makes a difference to a kernel's machine code.

    :raise TypeError: When a kernel reads something that cannot be told apart.
    """
    parts = [target(), *map(_source, _MAKERS), _of_kernel(kernel), *map(_plain, key)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def sources_changed() -> bool:
    """Whether a file has changed since fingerprints were made of it: what has been compiled since may be of either."""
    return any(_read(module) != before for module, before in _sources.items())


@functools.cache
def target() -> str:
    """The processor, Python, and the compiler with its settings."""
    features = binding.get_host_cpu_features().flatten()
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    machine = [platform.machine(), binding.get_host_cpu_name(), features, sys.version]
    return " ".join([*machine, *map(_version, _LIBRARIES), *settings])


def _version(name: str) -> str:
    """A library's version: by the names beside its package, as importlib.metadata takes its time to load."""
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        return name
    beside = os.listdir(Path(package.origin).parent.parent)
    if found := sorted(one for one in beside if one.startswith(f"{name}-") and one.endswith("-info")):
        return " ".join(found)
    from importlib.metadata import version

    return f"{name} {version(name)}"


_sources: dict[str, str] = {}


def _source(module: str) -> str:
    """Digest of a module's file, as it was when it was first asked for."""
    if module not in _sources:
        _sources[module] = _read(module)
    return _sources[module]


def _read(module: str) -> str:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise KernelError(f"the module {module}, which kernels need, is missing")
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


@functools.cache
def _of_kernel(kernel: KernelSource) -> str:
    function = kernel.function
    parts = [kernel.name, str(kernel.inline), str(kernel.hook), _of_code(function.__code__)]
    parts += [_of_value(function.__defaults__)]
    for name in sorted(names_in(function.__code__)):
        if name in function.__globals__:
            parts += [name, _of_value(function.__globals__[name])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _of_code(code: CodeType) -> str:
    parts = [code.co_name, code.co_code.hex(), code.co_exceptiontable.hex()]
    parts += map(repr, (code.co_argcount, code.co_kwonlyargcount, code.co_flags, code.co_names))
    parts += map(repr, (code.co_varnames, code.co_freevars, code.co_cellvars))
    parts += map(_of_value, code.co_consts)
    return "\0".join(parts)


def _of_value(value: Any) -> str:
    """A constant as compiled code may see it.

    :raise TypeError: When that cannot be said.
    """
    if isinstance(value, KernelSource):
        return _of_kernel(value)
    if isinstance(value, Late):
        return f"{value.path} {_source(value.module)} {_of_value(value.made_of)}"
    if isinstance(value, CodeType):
        return _of_code(value)
    if isinstance(value, tuple | frozenset):
        return f"{type(value)} {sorted(map(_of_value, value)) if isinstance(value, frozenset) else [*map(_of_value, value)]}"
    if isinstance(value, np.dtype):
        return repr(value.descr)
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, enum.Enum):
        return f"{type(value)} {value.value!r}"
    if value is None or isinstance(value, int | float | str | bytes | np.generic):
        return f"{type(value)} {value!r}"
    raise TypeError(f"a kernel reads {value!r}, which is no constant")


def _plain(part: Any) -> str:
    """A part of a key."""
    if isinstance(part, tuple):
        return repr((part[0].descr, *part[1:]))
    return part.str if isinstance(part, np.dtype) else str(part)
