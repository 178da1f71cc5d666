"""What boards with x86_64 CPUs have besides."""

from collections.abc import Sequence
from dataclasses import dataclass

from sterna.arch.x86_64.longmode import PAGE_TABLE_BYTES
from sterna.machine.board import DEVICE_TREE_ROOM, MAX_CPUS, Board
from sterna.memory.address import Ipa

_TIME_RECORD_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class X86Board(Board):
    """A board with x86_64 CPUs, which all start at once.

    :ivar sleep_timer: address of the device that a CPU sleeps by
    """

    sleep_timer: Ipa

    @property
    def page_tables(self) -> Ipa:
        """Where the loader puts the page tables."""
        return Ipa(self.ram_base + DEVICE_TREE_ROOM)

    def time_record(self, cpu: int) -> Ipa:
        """Where a CPU's time record is (struct pvclock_vcpu_time_info)."""
        return Ipa(self.page_tables + PAGE_TABLE_BYTES + cpu * _TIME_RECORD_BYTES)

    @property
    def written_by_host(self) -> Sequence[range]:
        """The CPUs' time records, when KVM's clock is restored."""
        return (range(self.time_record(0), self.time_record(MAX_CPUS)),)

    def reserved_bytes(self, device_tree_bytes: int) -> int:
        """Device tree, page tables, time records."""
        return self.time_record(MAX_CPUS) - self.ram_base
