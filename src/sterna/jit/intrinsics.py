"""What compiled functions of several kinds need, for the compiler."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

_WORD = ir.IntType(64)


@intrinsic
def stack_words(typing_context: Any, count: Any) -> Any:
    """An array of `count` int64, a constant, on the function's stack; what it holds at first is undefined."""
    if not isinstance(count, types.IntegerLiteral):
        raise RequireLiteralValue("the number of words on the stack is no constant")
    kind = types.Array(types.int64, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = _WORD(count.literal_value)
        return _array(context, builder, kind, cgutils.alloca_once(builder, _WORD, size=size), size)

    return kind(count), codegen


@intrinsic
def carray(typing_context: Any, pointer: Any, count: Any) -> Any:
    """`count` items at a pointer. numba's own of that name wants its memory management."""
    kind = types.Array(pointer.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _array(context, builder, kind, *args)

    return kind(pointer, types.int64), codegen


@intrinsic
def big_endian(typing_context: Any, data: Any, at: Any) -> Any:
    """The 64 bits from a place of an array of bytes on, as they stand on a wire: one load, which numba makes of no loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(data)(context, builder, args[0])
        place = builder.bitcast(builder.gep(array.data, [args[1]]), _WORD.as_pointer())
        return builder.bswap(builder.load(place, align=1))

    return types.int64(data, types.int64), codegen


def _array(context: Any, builder: Any, kind: Any, data: Any, size: Any) -> Any:
    array = context.make_array(kind)(context, builder)
    item = _WORD(context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    populate_array(array, data, shape=[size], strides=[item], itemsize=item, meminfo=None)
    return array._getvalue()
