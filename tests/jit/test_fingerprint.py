"""What makes a difference to compiled code changes its name."""

from typing import Any

import numpy as np
import pytest

from sterna.jit import fingerprint as module
from sterna.jit.fingerprint import fingerprint, sources_changed
from sterna.jit.kernel import COMPILED, Kernel, Late

pytestmark = pytest.mark.skipif(not COMPILED, reason="without numba there are only twins")

SOURCE = """
def inner(a: int) -> int:
    return a + STEP

def outer(a: int) -> int:
    if a > 3:
        return inner(a) * 2
    return a
"""
KEY = (int,)
RECORD = np.dtype([("first", np.int64), ("second", np.int64)])


def kernels(source: str = SOURCE, inline: bool = False, **names: Any) -> Kernel:
    """`outer`, which calls `inner`, as another program might have them."""
    scope: dict[str, Any] = {"__name__": "toy", "STEP": 1, **names}
    exec(source, scope)
    for name in ("inner", "outer"):
        scope[name] = Kernel(scope[name], ahead=False, inline=inline)
    made = scope["outer"]
    made.function.__globals__.update(scope)
    return made


SOUND = {"source": SOURCE}


def test_the_same_is_the_same() -> None:
    assert fingerprint(kernels(), KEY) == fingerprint(kernels(), KEY)
    assert fingerprint(kernels(UNUSED=5), KEY) == fingerprint(kernels(UNUSED=6), KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": SOURCE.replace("* 2", "* 3")},
        {"source": SOURCE.replace("* 2", "+ 2")},
        {"source": SOURCE.replace("a + STEP", "a - STEP")},
        {"source": SOURCE.replace("a > 3", "a >= 3")},
        {"source": SOURCE.replace("def outer(a: int)", "def outer(a: int = 1)")},
        {"STEP": 2},
        {"STEP": np.int64(1)},
        {"STEP": True},
        {"STEP": (1, 2)},
        {"STEP": np},
        {"STEP": len},
        {"STEP": RECORD},
        {"STEP": Late("sterna.jit.atomic_intrinsics:atomic_load")},
        {"STEP": Late("sterna.jit.atomic_intrinsics:atomic_load", RECORD)},
        {"STEP": Late("sterna.jit.intrinsics:carray")},
        {"inline": True},
    ],
)
def test_what_makes_a_difference_makes_another_name(changes: dict[str, Any]) -> None:
    assert fingerprint(kernels(**{**SOUND, **changes}), KEY) != fingerprint(kernels(), KEY)


def test_so_do_arguments() -> None:
    other = np.dtype([("second", np.int64), ("first", np.int64)])
    keys = [
        KEY,
        (bool,),
        (np.dtype(np.uint64),),
        *(
            ((dtype, ndim, flags),)
            for dtype in (RECORD, other)
            for ndim in (1, 2)
            for flags in (0x501, 0x500)
        ),
    ]
    assert len({fingerprint(kernels(), key) for key in keys}) == len(keys)


@pytest.mark.parametrize("name", ["NUMBA_OPT", "NUMBA_BOUNDSCHECK"])
def test_so_do_the_compilers_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(kernels(), KEY)
    monkeypatch.setenv(name, "1")
    module.target.cache_clear()
    try:
        assert fingerprint(kernels(), KEY) != before
    finally:
        monkeypatch.undo()
        module.target.cache_clear()


def test_what_is_no_constant_is_refused() -> None:
    with pytest.raises(TypeError, match="which is no constant"):
        fingerprint(kernels(STEP=[1]), KEY)


def test_a_compiler_that_has_changed_since_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint(kernels(), KEY)
    assert not sources_changed()
    monkeypatch.setitem(module._sources, "sterna.jit.compiler", "what it was before")
    assert sources_changed()
