"""Guest mode: the compiled loop that runs guest code, its abort handler, and how other threads reach into it.

Nothing here holds the GIL or calls Python. The emulated hardware ends at this module: stage-2 aborts, the broadcast of TLB
maintenance and `wfi` are dealt with inside guest mode; everything else leaves it.
"""

from enum import IntEnum

from unicorn import unicorn_const

from sterna.hypervisor.emulated.native import (
    Vcpu,
    call_c,
    carray,
    offset_of,
    slot_pointer,
    stage2_pointer,
    vcpu_pointer,
    words_pointer,
)
from sterna.jit.atomics import atomic_add, atomic_load, atomic_or, atomic_xchg, call_yield
from sterna.jit.kernel import hook, kernel
from sterna.stage2.fault import RESUME, handle_fault
from sterna.stage2.state import MAX_SLOTS, Words

OUTSIDE, IN_GUEST = 0, 1

REQUEST_EXIT = 1
"""Leave guest mode and return to whoever called run."""
REQUEST_TLB_FLUSH = 2
"""Leave guest mode and flush the TLB (the generic flush_remote_tlbs)."""
REQUEST_HOLD = 4
"""Leave guest mode and stay out while the memory map changes."""


class ExitKind(IntEnum):
    """Why guest mode was left, as far as the abort handler knows."""

    NONE = 0
    STAGE2 = 1
    """A stage-2 abort that no memory slot answers for."""
    HYPERCALL = 2
    EXCEPTION = 3
    """An exception of the guest's own: the emulated CPU has no vectors of its guest to take it to."""


# Exception numbers of the interrupt hook of Unicorn's ARM CPUs, of 32 and of 64 bits.
PREFETCH_ABORT, DATA_ABORT, HVC = 3, 4, 11

_STAGE2, _HYPERCALL, _EXCEPTION = 1, 2, 3
NO_ABORT = 1
"""Kept in HPFAR between aborts. A real HPFAR has its low four bits clear, so an abort that leaves this is stage 1's."""

_TLB_FLUSH = unicorn_const.UC_CTL_TLB_FLUSH | unicorn_const.UC_CTL_IO_WRITE << 30
_NO_END = 1
"""Where emulation is to end: an address that is never an instruction's."""

_REQUESTS = offset_of("requests")
_MODE = offset_of("mode")
_WAKE = offset_of("wake")
_INTERRUPT = offset_of("interrupt")
_BEGUN = offset_of("stops_begun")
_DONE = offset_of("stops_done")
_SCRATCH = offset_of("scratch")
_HPFAR = offset_of("hpfar_0")
_CVAL = offset_of("cval_0")
_COUNT = offset_of("count_0")
_POLLFD = offset_of("pollfd")
_TIMESPEC = offset_of("seconds")

_NS_PER_TICK = 16
_EXPIRED_WFI_NS = 10_000_000
_SPINS = 64


@hook
def on_exception(uc: int, number: int, vcpu_word: int) -> None:
    """The emulated CPU took an exception (uc_cb_hookintr_t). Runs inside emulation, on the vCPU's thread.

    :param number: in its lower 32 bits
    :param vcpu_word: where the address of the `VCPU` record is
    """
    number &= 0xFFFFFFFF
    cpu = carray(vcpu_pointer(atomic_load(vcpu_word)), 1)
    handle = cpu[0].uc
    kind = _EXCEPTION
    ipa = 0
    outcome = 0
    if number in (PREFETCH_ABORT, DATA_ABORT):
        hpfar = cpu[0].address + cpu[0].system_at + _HPFAR
        call_c(cpu[0].uc_reg_read, handle, cpu[0].system_register, hpfar, 0, 0)
        if cpu[0].hpfar_4 != NO_ABORT:
            ipa = cpu[0].hpfar_4 << 8
            cpu[0].hpfar_4 = NO_ABORT
            call_c(cpu[0].uc_reg_write, handle, cpu[0].system_register, hpfar, 0, 0)
            outcome = handle_fault(
                carray(stage2_pointer(cpu[0].stage2), 1),
                carray(slot_pointer(cpu[0].slots), MAX_SLOTS),
                carray(words_pointer(cpu[0].tables), cpu[0].table_words),
                ipa,
                cpu[0].index,
            )
            if outcome == RESUME:
                return
            kind = _STAGE2
    elif number == HVC:
        kind = _HYPERCALL
    cpu[0].exit_kind = kind
    cpu[0].exit_exception = number
    cpu[0].exit_ipa = ipa
    cpu[0].exit_outcome = outcome
    call_c(cpu[0].uc_emu_stop, handle, 0, 0, 0, 0)


@kernel()
def flush_tlb(cpu: Vcpu) -> None:
    """Empty this vCPU's TLB. On the vCPU's thread, with emulation stopped."""
    call_c(cpu[0].uc_ctl, cpu[0].uc, _TLB_FLUSH, 0, 0, 0)
    cpu[0].tlb_flushes += 1


@kernel(ahead=False)
def _wait_for_interrupt(cpu: Vcpu) -> None:
    """`wfi`: wait, without burning the processor, for an interrupt, the timer, a wake-up or a request.

    An interrupt that is signalled ends each `wfi`, masked or not, until it no longer is (ARM DDI 0406C, B1.8.14).

    Unicorn 2.1 drops what a guest writes to CNTV_CTL, so a timer that the guest has switched off cannot be told from one that
    has expired: an expired deadline ends one wfi at once, and later ones after a while, which the architecture allows of any wfi.
    """
    address = cpu[0].address
    cpu[0].wfis += 1
    while (
        atomic_load(address + _REQUESTS) == 0
        and atomic_xchg(address + _WAKE, 0) == 0
        and atomic_load(address + _INTERRUPT) == 0
    ):
        timespec = 0
        expired = False
        if cpu[0].timer_wakes != 0:
            system = address + cpu[0].system_at
            call_c(cpu[0].uc_reg_read, cpu[0].uc, cpu[0].system_register, system + _CVAL, 0, 0)
            call_c(cpu[0].uc_reg_read, cpu[0].uc, cpu[0].system_register, system + _COUNT, 0, 0)
            left = (cpu[0].cval_4 - cpu[0].count_4) * _NS_PER_TICK
            expired = left <= 0
            if expired:
                if cpu[0].cval_4 != cpu[0].last_expired:
                    cpu[0].last_expired = cpu[0].cval_4
                    return
                left = _EXPIRED_WFI_NS
            cpu[0].seconds = left // 1_000_000_000
            cpu[0].nanoseconds = left % 1_000_000_000
            timespec = address + _TIMESPEC
        if call_c(cpu[0].ppoll, address + _POLLFD, 1, timespec, 0, 0) > 0:
            call_c(cpu[0].read, cpu[0].pollfd & 0xFFFFFFFF, address + _SCRATCH, 8, 0, 0)
        elif expired:
            return


@kernel()
def run_guest(cpu: Vcpu, tlbi: int) -> None:
    """Run guest code until there is a request, an exit or an error; the caller looks which.

    :param tlbi: address of this CPU's word in `Stage2.tlbi_pending`
    """
    address = cpu[0].address
    cpu[0].exit_kind = 0
    cpu[0].error = 0
    while True:
        atomic_xchg(address + _MODE, IN_GUEST)
        if atomic_load(address + _REQUESTS) != 0:
            break
        if atomic_xchg(tlbi, 0) != 0:
            flush_tlb(cpu)
        done = atomic_load(address + _DONE)
        call_c(cpu[0].uc_reg_read, cpu[0].uc, cpu[0].status_register, address + _SCRATCH, 0, 0)
        thumb = 1 if (cpu[0].scratch & cpu[0].thumb) != 0 else 0
        cpu[0].scratch = 0
        call_c(cpu[0].uc_reg_read, cpu[0].uc, cpu[0].pc_register, address + _SCRATCH, 0, 0)
        pc = (cpu[0].scratch & ~1) | thumb
        cpu[0].entries += 1
        error = call_c(cpu[0].uc_emu_start, cpu[0].uc, pc, _NO_END, 0, 0)
        atomic_xchg(address + _MODE, OUTSIDE)
        if error != 0:
            cpu[0].error = error
            break
        if cpu[0].exit_kind != 0:
            break
        if atomic_load(address + _BEGUN) == done:
            _wait_for_interrupt(cpu)
    atomic_xchg(address + _MODE, OUTSIDE)


@kernel(ahead=False)
def _stop(cpu: Vcpu) -> None:
    address = cpu[0].address
    atomic_add(address + _BEGUN, 1)
    call_c(cpu[0].uc_emu_stop, cpu[0].uc, 0, 0, 0, 0)
    atomic_add(address + _DONE, 1)


@kernel()
def request(cpu: Vcpu, bit: int) -> bool:
    """Make a request of a vCPU: whether it was in guest mode."""
    atomic_or(cpu[0].address + _REQUESTS, bit)
    return bool(atomic_load(cpu[0].address + _MODE) == IN_GUEST)


@kernel()
def take_requests(cpu: Vcpu) -> int:
    """The requests made of this vCPU, which are then gone."""
    return int(atomic_xchg(cpu[0].address + _REQUESTS, 0))


@kernel()
def force_out(cpu: Vcpu) -> None:
    """Return when a vCPU with a request pending is out of guest mode, and so will serve the request before it enters.

    A stop that falls into the start of emulation is lost, hence the loop.
    """
    spins = 0
    while atomic_load(cpu[0].address + _MODE) == IN_GUEST and atomic_load(cpu[0].address + _REQUESTS) != 0:
        if spins % _SPINS == 0:
            _stop(cpu)
            call_yield(cpu[0].sched_yield)
        spins += 1


@kernel()
def stop_from_within(cpu: Vcpu) -> None:
    """Stop emulation from a device's callback, on the vCPU's own thread, where no stop is lost."""
    _stop(cpu)


@kernel()
def set_wake(cpu: Vcpu) -> None:
    """End this vCPU's wfi, now or the next one. The caller signals the event file too."""
    atomic_xchg(cpu[0].address + _WAKE, 1)


@kernel()
def broadcast_tlbi(addresses: Words, tlbi: int) -> None:
    """TLBIALLIS; DSB ISH: every CPU's TLB is empty, or will be before it runs another guest instruction.

    :param addresses: of the `VCPU` records, dtype int64
    :param tlbi: address of the first CPU's word in `Stage2.tlbi_pending`
    """
    for i in range(addresses.size):
        cpu = carray(vcpu_pointer(addresses[i]), 1)
        atomic_xchg(tlbi + 8 * cpu[0].index, 1)
    for i in range(addresses.size):
        cpu = carray(vcpu_pointer(addresses[i]), 1)
        spins = 0
        while atomic_load(cpu[0].address + _MODE) == IN_GUEST and atomic_load(tlbi + 8 * cpu[0].index) != 0:
            if spins % _SPINS == 0:
                _stop(cpu)
                call_yield(cpu[0].sched_yield)
            spins += 1
