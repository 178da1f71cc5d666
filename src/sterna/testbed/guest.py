"""What the test bed asks of a guest, whatever it runs on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sterna.guests.layout import CPU_RECORD, STATUS, STATUS_OFFSET, NetWord, ProgramId, Status
from sterna.launch.console import Line
from sterna.launch.guestview import (
    PAGE_WRITERS,
    check_content,
    known_status,
    pages_in_use,
    pages_written,
    warm_status,
)
from sterna.launch.process import VmProcess


@dataclass(frozen=True)
class ObservedGuest:
    """A guest program that ships with sterna, seen through its status page: its own account of itself at one time. Its memory or
    its console is looked at; it is not disturbed.

    :ivar written_by_host: addresses of RAM that a hypervisor writes on its own when it takes a guest over
    """

    ram_base: int
    ram_bytes: int
    written_by_host: Sequence[range] = ()

    def status_address(self, vm: VmProcess) -> int | None:
        """Where the status page is; None: not known yet."""
        return self.ram_base + STATUS_OFFSET

    def warmed_up(self, vm: VmProcess) -> bool:
        """Whether it works at its steady pace.

        :raise VmError: When it never will.
        """
        return warm_status(vm, self.status_address(vm)) is not None

    def mark(self, vm: VmProcess) -> Status:
        """Its account as of now."""
        return known_status(vm, self.status_address(vm))

    def jitter_ms(self, since: Status, now: Status) -> float:
        """The longest that it stood still between the two by its own counter."""
        starts = [int(since.cpu(index)["last_counter"]) for index in range(since.cpus)]
        gaps = [gap.milliseconds for cpu, start in enumerate(starts) for gap in now.gaps_since(cpu, start)]
        largest = now.largest_gap()
        if largest.start >= min(starts):
            gaps.append(largest.milliseconds)
        return max(gaps, default=0.0)

    def work(self, mark: Status) -> int:
        """How much it has done: pages written, or steps."""
        return pages_written(mark) if mark.program in PAGE_WRITERS else mark.steps()

    def answered(self, mark: Status) -> Mapping[str, int]:
        """How many requests from the network it has answered: `icmp`, `udp`; and how many numbers of a session it has not seen:
        `lost`. Empty when it does not count.
        """
        if mark.program is not ProgramId.NET:
            return {}
        words = {"icmp": NetWord.ICMP, "udp": NetWord.UDP, "lost": NetWord.LOST}
        return {name: mark.word(0, word) for name, word in words.items()}

    def pulse(self, vm: VmProcess) -> int:
        """A number that changes while it runs, cheap to look at often: the counter as CPU 0 has read it last."""
        fields = STATUS.fields, CPU_RECORD.fields
        assert fields[0] is not None
        assert fields[1] is not None
        offset = fields[0]["cpu"][1] + fields[1]["last_counter"][1]
        address = self.status_address(vm)
        return 0 if address is None else int.from_bytes(vm.memory(address + offset, 8), "little")

    def check(self, vm: VmProcess) -> tuple[int, list[str]]:
        """Compare its memory with what it must have written: pages compared, problems. It is stopped meanwhile if it runs."""
        status = self.mark(vm)
        return pages_in_use(status), check_content(vm, self.ram_base, self.ram_bytes, status)

    def own_lines(self, lines: Sequence[Line]) -> list[Line]:
        """Of what came from its console, what its program said."""
        return list(lines)

    def last_words(self, vm: VmProcess) -> str:
        """To add to an error: what it said last; empty when that tells nothing."""
        return ""
