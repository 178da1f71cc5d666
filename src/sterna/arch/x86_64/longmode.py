"""How an x86_64 guest starts: in long mode, at privilege level 3, with the page tables that the loader has made.

A program at level 3 runs on the CPU itself even where the host is a guest that emulates what level 0 does. It has no exception
handlers: an exception ends in a triple fault, which the machine reports. It gets no interrupts and cannot halt.
"""

import struct

from sterna.arch.x86_64.state import MSR_KVM_SYSTEM_TIME, X86VcpuState

_GIB = 1 << 30
_MAPPED_GIB = 4
_ENTRIES = 512
PAGE_TABLE_BYTES = 4096 * (2 + _MAPPED_GIB)
# Intel SDM vol. 3, 4.5: present, writable, user, accessed, dirty, large page. Accessed and dirty are set already: the CPU
# then never writes to the tables, and their pages stay clean.
_TABLE = 0x27
_LARGE_PAGE = 0xE7

_CODE_SELECTOR, _DATA_SELECTOR = 0x2B, 0x23
_CODE_TYPE, _DATA_TYPE = 11, 3
_USER = 3
_CR0 = 0x8005_0033  # PE, MP, ET, NE, WP, AM, PG
_CR4 = 0x620  # PAE, OSFXSR, OSXMMEXCPT
_EFER = 0x500  # LME, LMA
_RFLAGS = 0x2
_CLOCK_ON = 1


def page_tables(base: int, gib: int = _MAPPED_GIB) -> bytes:
    """Page tables for physical address `base` that map the first GiB to themselves, in pages of 2 MiB, writable at level 3.

    :param gib: how many, up to 512; the tables take two pages and one for each
    """
    directory_pointers = base + 4096
    directories = [base + 4096 * (2 + number) for number in range(gib)]
    tables = [
        [directory_pointers | _TABLE],
        [address | _TABLE for address in directories],
        *(
            [number * _GIB + (entry << 21) | _LARGE_PAGE for entry in range(_ENTRIES)]
            for number in range(gib)
        ),
    ]
    return b"".join(struct.pack(f"<{len(table)}Q", *table).ljust(4096, b"\0") for table in tables)


def start(state: X86VcpuState, entry: int, cpu: int, tables: int, time_record: int) -> None:
    """Let a vCPU begin at `entry` with its number in rdi and the address of its time record in rsi.

    :param state: as a new vCPU has it; changed in place
    :param tables: address of the page tables
    :param time_record: where the hypervisor is to keep the vCPU's time record (struct pvclock_vcpu_time_info)
    """
    flat = {
        "base": 0,
        "limit": 0xFFFF_FFFF,
        "present": 1,
        "dpl": _USER,
        "s": 1,
        "g": 1,
        "avl": 0,
        "unusable": 0,
    }
    code = flat | {"selector": _CODE_SELECTOR, "type": _CODE_TYPE, "l": 1, "db": 0}
    data = flat | {"selector": _DATA_SELECTOR, "type": _DATA_TYPE, "l": 0, "db": 1}
    state.segments |= {"cs": code} | {name: dict(data) for name in ("ds", "es", "fs", "gs", "ss")}
    # Nothing to find there: an exception is a triple fault.
    state.gdt = state.idt = (0, 0)
    state.control |= {"cr0": _CR0, "cr3": tables, "cr4": _CR4, "efer": _EFER}
    state.regs |= dict.fromkeys(state.regs, 0)
    state.regs |= {"rip": entry, "rflags": _RFLAGS, "rdi": cpu, "rsi": time_record}
    state.msrs[MSR_KVM_SYSTEM_TIME] = time_record | _CLOCK_ON
