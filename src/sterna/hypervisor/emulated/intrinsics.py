"""What `sterna.hypervisor.emulated.native` names, for the compiler."""

from typing import Any

from llvmlite import ir
from numba import from_dtype, types
from numba.extending import intrinsic

from sterna.hypervisor.emulated.native import VCPU
from sterna.stage2.state import SLOT, STAGE2

_WORD = ir.IntType(64)
_INT = ir.IntType(32)
C_ARGUMENTS = 5


@intrinsic
def call_c(typing_context: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    """Call the C function at address `function`, which takes at most five integers or pointers and returns an int.

    Integers travel in registers, so a callee that takes fewer or narrower ones ignores the rest (System V AMD64 ABI 3.2.3;
    AAPCS64 6.8.2).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_INT, [_WORD] * C_ARGUMENTS)
        target = builder.inttoptr(args[0], kind.as_pointer())
        return builder.sext(builder.call(target, args[1:]), _WORD)

    return types.int64(*[types.int64] * (C_ARGUMENTS + 1)), codegen


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def cast(typing_context: Any, address: Any) -> Any:
        result = types.CPointer(kind)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), codegen

    return cast


vcpu_pointer = _pointer_to(from_dtype(VCPU))
stage2_pointer = _pointer_to(from_dtype(STAGE2))
slot_pointer = _pointer_to(from_dtype(SLOT))
words_pointer = _pointer_to(types.int64)
