"""What the test bed asks of a guest, whatever runs in it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sterna.guests.layout import (
    CPU_RECORD,
    STATUS,
    STATUS_OFFSET,
    DirtyramWord,
    NetWord,
    ProgramId,
    Status,
)
from sterna.launch.console import Line
from sterna.launch.guestview import (
    GuestGap,
    check_content,
    guest_status,
    migration_gap,
    pages_in_use,
    runs_beyond,
    warm_status,
)
from sterna.launch.process import Vm
from sterna.testbed.errors import BedError

Mark = Any
"""A guest's own account of itself at one time. Each kind of guest has its own."""


class Guest(Protocol):
    """A guest that can be asked. Its memory or its console is looked at; it is not disturbed."""

    ram_base: int
    ram_bytes: int
    written_by_host: Sequence[range]
    """Addresses of RAM that a hypervisor writes on its own when it takes a guest over."""

    def warmed_up(self, vm: Vm) -> bool:
        """Whether it works at its steady pace.

        :raise VmError: When it never will.
        """
        ...

    def mark(self, vm: Vm) -> Mark:
        """Its account as of now."""
        ...

    def beyond(self, last: Mark, now: Mark) -> bool:
        """Whether it has run between the two."""
        ...

    def gap(self, last: Mark, now: Mark) -> GuestGap:
        """How long it stood still right after `last`, by its own counter."""
        ...

    def jitter_ms(self, since: Mark, now: Mark) -> float:
        """The longest that it stood still between the two by its own counter."""
        ...

    def work(self, mark: Mark) -> int:
        """How much it has done."""
        ...

    def pages_in_use(self, mark: Mark) -> int:
        """Pages that it writes."""
        ...

    def answered(self, mark: Mark) -> Mapping[str, int]:
        """How many requests from the network it has answered: `icmp`, `udp`; and how many numbers of a session it has not seen:
        `lost`. Empty when it does not count.
        """
        ...

    def pulse(self, vm: Vm) -> int:
        """A number that changes while it runs; cheap, for looking often."""
        ...

    def check(self, vm: Vm) -> tuple[int, list[str]]:
        """Compare its memory with what it must have written: pages compared, problems. It is stopped meanwhile if it runs."""
        ...

    def own_lines(self, lines: Sequence[Line]) -> list[Line]:
        """Of what came from its console, what its program said."""
        ...

    def last_words(self, vm: Vm) -> str:
        """To add to an error: what it said last; empty when that tells nothing."""
        ...


class BareGuest:
    """A guest program that ships with sterna, seen through its status page."""

    def __init__(self, ram_base: int, ram_bytes: int, written_by_host: Sequence[range] = ()) -> None:
        self.ram_base = ram_base
        self.ram_bytes = ram_bytes
        self.written_by_host = written_by_host

    def status_address(self, vm: Vm) -> int | None:
        """Where the status page is; None: not known yet."""
        return self.ram_base + STATUS_OFFSET

    def warmed_up(self, vm: Vm) -> bool:
        return warm_status(vm, self.status_address(vm)) is not None

    def mark(self, vm: Vm) -> Status:
        status = self._status(vm)
        if status is None:
            raise BedError(f"the RAM of the {vm.name} holds no status page of a guest program")
        return status

    def beyond(self, last: Status, now: Status) -> bool:
        return runs_beyond(last, now)

    def gap(self, last: Status, now: Status) -> GuestGap:
        return migration_gap(last, now)

    def jitter_ms(self, since: Status, now: Status) -> float:
        starts = [int(since.cpu(index)["last_counter"]) for index in range(since.cpus)]
        gaps = [gap.milliseconds for cpu, start in enumerate(starts) for gap in now.gaps_since(cpu, start)]
        largest = now.largest_gap()
        if largest.start >= min(starts):
            gaps.append(largest.milliseconds)
        return max(gaps, default=0.0)

    def work(self, mark: Status) -> int:
        """Pages written, or steps done."""
        if mark.program in (ProgramId.DIRTYRAM, ProgramId.NET):
            return sum(mark.word(index, DirtyramWord.WRITES) for index in range(mark.cpus))
        return mark.steps()

    def pages_in_use(self, mark: Status) -> int:
        return pages_in_use(mark)

    def answered(self, mark: Status) -> dict[str, int]:
        if mark.program is not ProgramId.NET:
            return {}
        words = {"icmp": NetWord.ICMP, "udp": NetWord.UDP, "lost": NetWord.LOST}
        return {name: mark.word(0, word) for name, word in words.items()}

    def pulse(self, vm: Vm) -> int:
        """The counter as CPU 0 has read it last."""
        fields = STATUS.fields, CPU_RECORD.fields
        assert fields[0] is not None
        assert fields[1] is not None
        offset = fields[0]["cpu"][1] + fields[1]["last_counter"][1]
        address = self.status_address(vm)
        return 0 if address is None else int.from_bytes(vm.memory(address + offset, 8), "little")

    def check(self, vm: Vm) -> tuple[int, list[str]]:
        status = self.mark(vm)
        return pages_in_use(status), check_content(vm, self.ram_base, self.ram_bytes, status)

    def own_lines(self, lines: Sequence[Line]) -> list[Line]:
        return list(lines)

    def last_words(self, vm: Vm) -> str:
        return ""

    def _status(self, vm: Vm) -> Status | None:
        address = self.status_address(vm)
        return None if address is None else guest_status(vm, address)
