"""Calls from compiled code into C libraries, and records reached by address."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.extending import intrinsic

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


VCPU = np.dtype(
    [
        (name, np.int64)
        for name in (
            "address",
            "uc",
            "index",
            # OUTSIDE or IN_GUEST. With `requests` and the TLBI word it forms the usual pair: the vCPU writes `mode` and then
            # reads the flags, whoever wants something writes a flag and then reads `mode`.
            "mode",
            "requests",
            # Calls of uc_emu_stop begun and done: a return from emulation that none of them overlaps is a wfi.
            "stops_begun",
            "stops_done",
            "wake",
            "timer_wakes",
            # What made guest code stop: an ExitKind, the exception's number, the faulting IPA, a stage-2 Outcome.
            "exit_kind",
            "exit_exception",
            "exit_ipa",
            "exit_outcome",
            "error",
            # Stage 2: addresses of its records, and the number of words in its tables.
            "stage2",
            "slots",
            "tables",
            "table_words",
            # struct pollfd and struct timespec for a wfi; somewhere to read the event counter to.
            "pollfd",
            "seconds",
            "nanoseconds",
            "scratch",
            # struct uc_arm_cp_reg of HPFAR, CNTV_CVAL and CNTVCT, five words each.
            *(f"{name}_{i}" for name in ("hpfar", "cval", "count") for i in range(5)),
            # The timer's deadline that ended a wfi last.
            "last_expired",
            # C functions.
            "uc_emu_start",
            "uc_emu_stop",
            "uc_reg_read",
            "uc_reg_write",
            "uc_ctl",
            "ppoll",
            "read",
            "sched_yield",
            "entries",
            "wfis",
            "tlb_flushes",
        )
    ]
)
"""What one vCPU shares with compiled code."""

vcpu_pointer = _pointer_to(from_dtype(VCPU))
stage2_pointer = _pointer_to(from_dtype(STAGE2))
slot_pointer = _pointer_to(from_dtype(SLOT))
words_pointer = _pointer_to(types.int64)


def offset_of(field: str) -> int:
    """Byte offset of a field of `VCPU`."""
    return int(VCPU.fields[field][1])  # type: ignore[index]
