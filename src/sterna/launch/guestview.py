"""What a guest program's status page tells on either side of a migration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sterna.guests.check import check_ram
from sterna.guests.layout import (
    GAP_RECORDS,
    PAGE_BYTES,
    STATUS_BYTES,
    WORK_OFFSET,
    ClockWord,
    DirtyramWord,
    GuestState,
    ProgramId,
    RandomWord,
    Status,
    StatusError,
    read_status,
)
from sterna.launch.errors import VmError
from sterna.launch.process import VmProcess

PAGE_WRITERS = (ProgramId.DIRTYRAM, ProgramId.NET)
"""Programs with the words of `DirtyramWord`."""


@dataclass(frozen=True)
class GuestGap:
    """The time that the guest's own counter says it did not run across the migration.

    :ivar ms: its length; when not `exact`, no less than its length, of which the guest's record says no more
    """

    ms: float
    exact: bool


def guest_status(vm: VmProcess, address: int | None) -> Status | None:
    """The status page, as of now; None until the program has filled it.

    :param address: where it is; None: not known yet
    :raise VmError: When the process is gone.
    """
    if address is None:
        return None
    try:
        return read_status(vm.memory(address, STATUS_BYTES))
    except StatusError:
        return None


def known_status(vm: VmProcess, address: int | None) -> Status:
    """The status page of a program that has filled it.

    :raise VmError: When there is none, or the process is gone.
    """
    status = guest_status(vm, address)
    if status is None:
        raise VmError(f"the RAM of the {vm.name} holds no status page of a guest program")
    return status


def warm_status(vm: VmProcess, address: int | None) -> Status | None:
    """The status page of a program that works at its steady pace; None as long as it does not.

    :param address: as of `guest_status`
    :raise VmError: When it never will.
    """
    status = guest_status(vm, address)
    if status is not None and status.state is GuestState.ERROR:
        raise VmError(f"the guest of the {vm.name} gave up: {status.error.name}")
    state = vm.command("query-status")
    if not state["running"]:
        raise VmError(f"the guest of the {vm.name} stopped: {state.get('x-sterna-error', state['status'])}")
    return status if status is not None and _works(status) else None


def _works(status: Status) -> bool:
    """Whether the program has written all its pages once and works at its steady pace."""
    if status.state is not GuestState.RUNNING or status.cpus == 0:
        return False
    works = _WORKS[status.program]
    return all(works(status, cpu) for cpu in range(status.cpus))


_WORKS: Mapping[ProgramId, Callable[[Status, int], bool]] = {
    ProgramId.DIRTYRAM: lambda status, cpu: status.word(cpu, DirtyramWord.PASSES) > 0,
    ProgramId.NET: lambda status, cpu: (
        int(status.cpu(cpu)["steps"]) > 0
        and (status.word(cpu, DirtyramWord.PASSES) > 0 or not status.word(cpu, DirtyramWord.PAGES))
    ),
    ProgramId.RANDOM: lambda status, cpu: (
        status.word(cpu, RandomWord.STEPS) > 0
        and status.word(cpu, RandomWord.READY) >= status.word(cpu, RandomWord.PAGES)
    ),
    ProgramId.CLOCK: lambda status, cpu: cpu > 0 or status.word(cpu, ClockWord.SEQUENCE) > 0,
}


def runs_beyond(before: Status, now: Status) -> bool:
    """Whether every CPU that ran in `before` has read its counter since."""
    return all(
        int(now.cpu(cpu)["last_counter"]) > int(before.cpu(cpu)["last_counter"])
        for cpu in range(before.cpus)
        if int(before.cpu(cpu)["last_counter"])
    )


def migration_gap(last: Status, now: Status) -> GuestGap:
    """The longest gap over all CPUs that began with the last reading at the source.

    :param last: the source's final status; the guest does not run there any more
    :param now: the destination's, once it `runs_beyond` it
    """
    found = [gap for cpu in range(last.cpus) if (gap := _gap_after(now, cpu, last)) is not None]
    if found:
        return GuestGap(max(found), True)
    return GuestGap(max((_longest_possible(now, cpu, last) for cpu in range(last.cpus)), default=0.0), False)


def _gap_after(now: Status, cpu: int, last: Status) -> float | None:
    """Milliseconds without a reading on one CPU, from its last one at the source."""
    start = int(last.cpu(cpu)["last_counter"])
    record = now.cpu(cpu)
    if start and int(record["largest_gap_start"]) == start:
        return now.milliseconds(int(record["largest_gap"]))
    # Not its largest: among the latest, if it is not older than those.
    return next((gap.milliseconds for gap in now.gaps_since(cpu, start) if gap.start == start), None)


def _longest_possible(now: Status, cpu: int, last: Status) -> float:
    """Milliseconds that a gap without a record of its own may have taken on one CPU."""
    limit = int(now.record["long_gap_ticks"])  # the guest records none that is shorter
    start = int(last.cpu(cpu)["last_counter"])
    if not start:
        return now.milliseconds(limit)
    if int(now.cpu(cpu)["long_gaps"]) - int(last.cpu(cpu)["long_gaps"]) > GAP_RECORDS:
        return now.milliseconds(int(now.cpu(cpu)["largest_gap"]))  # later ones have taken its place
    # A CPU that was stopped between reading its counter and writing down what it read has begun the gap with that.
    begun = (gap for gap in now.gaps_since(cpu, start) if gap.start - start <= limit)
    return max((gap.milliseconds for gap in begun), default=now.milliseconds(limit))


def pages_in_use(status: Status) -> int:
    """Work pages up to the last that the program writes."""
    ends = [0]
    for cpu in range(status.cpus):
        if status.program in PAGE_WRITERS:
            ends.append(status.word(cpu, DirtyramWord.FIRST) + status.word(cpu, DirtyramWord.PAGES))
        elif status.program is ProgramId.RANDOM:
            ends.append(
                status.word(cpu, RandomWord.FIRST)
                + status.word(cpu, RandomWord.TABLE_PAGES)
                + status.word(cpu, RandomWord.PAGES)
            )
    return max(ends)


def pages_written(status: Status) -> int:
    """Pages that the program has written so far, some of them often; 0 of one that does not count them."""
    if status.program not in PAGE_WRITERS:
        return 0
    return sum(status.word(cpu, DirtyramWord.WRITES) for cpu in range(status.cpus))


def check_content(vm: VmProcess, ram_base: int, ram_bytes: int, status: Status) -> list[str]:
    """Compare the program's pages with what it must have written. The guest is stopped meanwhile.

    :return: problems, one line each
    """
    used = min(ram_bytes, WORK_OFFSET + pages_in_use(status) * PAGE_BYTES)
    vm.command("stop")
    try:
        memory = vm.memory(ram_base, used)
    finally:
        vm.command("cont")
    return check_ram(np.frombuffer(memory, dtype=np.uint8))
