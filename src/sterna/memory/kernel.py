"""Compiled kernels: machine code made from Python, which runs without the GIL, and their plain twins.

`@kernel(twin=f)` compiles the decorated function with numba. Where numba is missing the twin runs in its place, so that
everything that is not emulation works without a compiler. Tests compare each kernel with its twin.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from sterna.memory.kernelcache import cache_directory

try:
    import numba
except ImportError:  # pragma: no cover - hosts without numba run the twins
    numba = None

F = TypeVar("F", bound=Callable[..., Any])

COMPILED = numba is not None

if numba is not None and "NUMBA_CACHE_DIR" not in os.environ:
    # Before the first function is decorated: stage2/ imports this module for it.
    numba.config.CACHE_DIR = str(cache_directory(Path(__file__).resolve().parent.parent))


def kernel(*, twin: F) -> Callable[[F], F]:
    """Compile the decorated function (cached on disk, GIL released), or use `twin` where numba is missing.

    The twin stays reachable as the attribute `twin` of the result.
    """

    def wrap(function: F) -> F:
        result: Any = twin if numba is None else numba.njit(nogil=True, cache=True)(function)
        result.twin = twin
        return cast(F, result)

    return wrap
