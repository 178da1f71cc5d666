"""What `sterna.jit.atomics` names, for the compiler."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_WORD = ir.IntType(64)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


def _of_word(emit: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic that makes a word of a word: what the decorated function has a builder emit."""

    @intrinsic
    def of_word(typing_context: Any, word: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0])

        return types.int64(types.int64), codegen

    return of_word


def _exchange(operation: str) -> Any:
    """An intrinsic that changes the word at an address by another: the word that was there."""

    @intrinsic
    def exchange(typing_context: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _pointer(builder, args[0]), args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return exchange


atomic_xchg = _exchange("xchg")
"""Store the other."""
atomic_or = _exchange("or")
"""Set its bits."""
atomic_and = _exchange("and")
"""Keep only its bits."""
atomic_add = _exchange("add")
"""Add it."""


@_of_word
def atomic_load(builder: Any, address: Any) -> Any:
    """The word at an address."""
    return builder.load_atomic(_pointer(builder, address), "seq_cst", 8, typ=_WORD)


@intrinsic
def store_release(typing_context: Any, words: Any, at: Any, value: Any) -> Any:
    """Store `value` at a position of an array of words, which has no gaps."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        builder.store_atomic(args[2], builder.gep(array.data, [args[1]]), "release", 8)
        return context.get_dummy_value()

    return types.none(words, types.int64, types.int64), codegen


@_of_word
def lowest_bit(builder: Any, word: Any) -> Any:
    """Number of the lowest set bit of a word that is not zero."""
    return builder.cttz(word, ir.Constant(ir.IntType(1), 1))


@_of_word
def highest_bit(builder: Any, word: Any) -> Any:
    """Number of the highest set bit of a word that is not zero."""
    return builder.sub(ir.Constant(_WORD, 63), builder.ctlz(word, ir.Constant(ir.IntType(1), 1)))


@_of_word
def call_yield(builder: Any, function: Any) -> Any:
    """Call the C function at an address, of type int(void)."""
    kind = ir.FunctionType(ir.IntType(32), [])
    return builder.sext(builder.call(builder.inttoptr(function, kind.as_pointer()), []), _WORD)
