"""Kernels as they run where numba is missing."""

from types import FunctionType
from typing import Any

from sterna.jit.kernel import Kernel
from sterna.jit.source import names_in


def plain(made: Any) -> Any:
    """What `kernel` made, and all that it calls, without compiled code."""
    function = made.twin
    names = dict(function.__globals__)
    for name in names_in(function.__code__):
        if isinstance(names.get(name), Kernel):
            names[name] = plain(names[name])
    return FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
