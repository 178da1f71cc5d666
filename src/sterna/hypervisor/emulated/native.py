"""Calls from compiled code into C libraries, and records reached by address."""

from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import Late
from sterna.stage2.state import SLOT, STAGE2

SYSTEM_WORDS = 5
"""Room for Unicorn's structure for a system register. One that takes less has the last of them: there is the value."""

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
            # The level of the CPU's interrupt line: 1 is high.
            "interrupt",
            "timer_wakes",
            # What made guest code stop: an ExitKind, the exception's number, the faulting IPA, a stage-2 FaultResult.
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
            # How registers are read: Unicorn's numbers for a system register, the program counter, the status register; its
            # Thumb bit, if it has one; where in its room the structure for a system register begins.
            "system_register",
            "pc_register",
            "status_register",
            "thumb",
            "system_at",
            *(f"{name}_{i}" for name in ("hpfar", "cval", "count") for i in range(SYSTEM_WORDS)),
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

Vcpu: TypeAlias = Annotated[NDArray[Any], VCPU]
"""`shape (1,)`"""

carray: Any = Late("sterna.jit.intrinsics:carray")
call_c: Any = Late("sterna.hypervisor.emulated.intrinsics:call_c")
vcpu_pointer: Any = Late("sterna.hypervisor.emulated.intrinsics:vcpu_pointer", VCPU)
stage2_pointer: Any = Late("sterna.hypervisor.emulated.intrinsics:stage2_pointer", STAGE2)
slot_pointer: Any = Late("sterna.hypervisor.emulated.intrinsics:slot_pointer", SLOT)
words_pointer: Any = Late("sterna.hypervisor.emulated.intrinsics:words_pointer")


def offset_of(field: str) -> int:
    """Byte offset of a field of `VCPU`."""
    return int(VCPU.fields[field][1])  # type: ignore[index]
