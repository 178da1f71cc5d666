"""The memory that stage 2 works on: plain records, so that compiled code and Python share them.

Addresses and descriptors are signed 64-bit integers: bit 63 is unused, and one integer type keeps compiled arithmetic exact.
"""

from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

MAX_SLOTS = 32
MAX_CPUS = 8

COUNTERS = (
    "faults_translation",
    "faults_permission",
    "faults_access_flag",
    "faults_spurious",
    "faults_unhandled",
    "dirty_marked",
    "pages_protected",
    "blocks_protected",
    "blocks_dissolved",
    "blocks_rebuilt",
    "leaves_3",
    "leaves_2",
    "leaves_1",
    "tables",
    "tlbi_posted",
)
"""Statistics kept by compiled code. The four after `blocks_rebuilt` say what is mapped now; the others only grow."""

STAGE2 = np.dtype(
    [
        (name, np.int64)
        for name in (
            # First what each fault reads, close together. mmu_lock: whoever changes a table or a bitmap's meaning holds it.
            "lock",
            "lock_address",
            "sched_yield",
            "pool_pa",
            "root_pa",
            # The architecture's descriptor format (format.py). Of `shifts` that of the last level is in bits 0 to 7, that of the
            # level above in bits 8 to 15 and so on; above the root's there is 62, so that its index is all that is left.
            "root_entries",
            "root_level",
            "shifts",
            "present",
            "kind",
            "table",
            "address",
            "write",
            "access",
            "slot_count",
            # Absent leaves populated and access flags set so far, and what each CPU knows of that number.
            "populations",
            "seen_address",
            "page",
            "block",
            # The largest leaf that may be installed, in bytes.
            "max_leaf",
            "cpus",
            "tlbi_address",
            # The table pool, from physical address `pool_pa` on: number of pages, bytes of each as a power of two. Its lists of
            # pages (page number + 1; 0 ends one): free; released, with no flush begun since; released, with a flush begun since
            # and not yet ended. Of the latter the last page, too.
            "pool_pages",
            "table_shift",
            "pool_free",
            "pool_retired",
            "pool_retired_last",
            "pool_flushing",
            "pool_flushing_last",
            *COUNTERS,
        )
    ]
)
"""One VM's stage 2. `tlbi_address` is an array of `MAX_CPUS` words: not zero while CPU n owes its TLB a flush.
`seen_address` is one too: the value of `populations` when CPU n last handled a fault."""

SLOT = np.dtype(
    [
        (name, np.int64)
        for name in (
            "number",
            "ipa",
            "size",
            # Physical address of the slot's first byte in the emulated machine.
            "pa",
            "readonly",
            # Address of the dirty bitmap; 0 while logging is off.
            "bitmap",
        )
    ]
)

State: TypeAlias = Annotated[NDArray[Any], STAGE2]
"""`shape (1,)`"""
Slots: TypeAlias = Annotated[NDArray[Any], SLOT]
Words: TypeAlias = NDArray[np.int64]
