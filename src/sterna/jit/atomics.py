"""Atomic operations and bit scans for compiled code, on 64-bit words given by address.

Sequentially consistent, as the kernel's xchg and cmpxchg are (Linux, Documentation/atomic_t.txt), but for `store_release`: who
sees what it stores, by an address that depends on it or an acquiring load, sees what was stored before it.
"""

from typing import Any

from sterna.jit.kernel import Late, kernel

atomic_load: Any = Late("sterna.jit.atomic_intrinsics:atomic_load")
atomic_xchg: Any = Late("sterna.jit.atomic_intrinsics:atomic_xchg")
atomic_or: Any = Late("sterna.jit.atomic_intrinsics:atomic_or")
atomic_and: Any = Late("sterna.jit.atomic_intrinsics:atomic_and")
atomic_add: Any = Late("sterna.jit.atomic_intrinsics:atomic_add")
store_release: Any = Late("sterna.jit.atomic_intrinsics:store_release")
lowest_bit: Any = Late("sterna.jit.atomic_intrinsics:lowest_bit")
highest_bit: Any = Late("sterna.jit.atomic_intrinsics:highest_bit")
call_yield: Any = Late("sterna.jit.atomic_intrinsics:call_yield")

_SPINS = 256
"""Attempts before the processor is given to somebody else: with more threads than processors the holder may not be running."""


@kernel()
def lock(address: int, sched_yield: int) -> None:
    """Take the spinlock whose word is at `address`."""
    spins = 0
    while atomic_xchg(address, 1) != 0:
        while atomic_load(address) != 0:
            spins += 1
            if spins % _SPINS == 0:
                call_yield(sched_yield)


@kernel()
def unlock(address: int) -> None:
    """Release the spinlock whose word is at `address`."""
    atomic_xchg(address, 0)
