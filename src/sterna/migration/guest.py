"""What migration asks of a virtual machine."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from sterna.hypervisor.traits import Trait
from sterna.memory.bitmap import DirtyBatch
from sterna.memory.ram import RamBlock
from sterna.ownership import Ownership
from sterna.stream.unmatched import Judgement, RamUse
from sterna.stream.vmstate import DeviceState, VmStateDescription


class MigratableGuest(Protocol):
    """A machine as its migration sees it. The calls may come from any thread, one at a time.

    :ivar machine_type: the name in the stream's configuration section, such as ``virt-7.2``
    :ivar ram_blocks: all of guest RAM; that of a machine which waits for a guest reads as zeros
    :ivar descriptions: how each device section is laid out on the wire, by section name
    :ivar page_bits: log2 of the stream's page size as the configuration section says it: 12 for `virt`; None
        when QEMU's machine of this type says nothing and so means 10, as `vexpress-a15`
    :ivar uuid: 16 bytes that tell this machine from others, or None
    :ivar ownership: whether the guest is this machine's; no vCPU runs unless it says so
    """

    machine_type: str
    ram_blocks: Sequence[RamBlock]
    descriptions: Mapping[str, VmStateDescription]
    page_bits: int | None
    uuid: bytes | None
    ownership: Ownership

    def check_migratable(self) -> None:
        """Whether there is a guest here that may go. Asked before a migration has any effect.

        :raise Exception: The machine's own, when there is none; one line that says why.
        """
        ...

    def guest_traits(self) -> Sequence[Trait]:
        """What the guest needs of a host that it goes to."""
        ...

    def host_traits(self) -> Mapping[str, int]:
        """What this host has for a guest that comes."""
        ...

    def start_dirty_logging(self) -> None:
        """Log writes to all RAM from now on; every page is then dirty in the log or write-protected."""
        ...

    def stop_dirty_logging(self) -> None:
        """Stop logging; stage 2 rebuilds its blocks in time. Does nothing when logging is off."""
        ...

    def harvest(self) -> list[DirtyBatch]:
        """Take the dirty log of every block and protect the pages again. The batches belong to the caller."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """No vCPU runs and no device touches RAM inside: what a vCPU has written is in RAM, and in the log. The run state and
        the guest's counter go on as they were.
        """
        ...

    def peek_dirty_log(self) -> list[DirtyBatch]:
        """What the dirty log of every block holds now, and the next harvest will have."""
        ...

    def positions(self) -> Sequence[int]:
        """The program counter of each vCPU. None may be running."""
        ...

    def locate(self, block: str, page: int) -> tuple[int, int]:
        """The memory slot that has a page of a RAM block, and the guest physical address."""
        ...

    def throttle(self, percent: int) -> None:
        """Let the vCPUs stand still for 0 to 99 percent of their time; 0 lets them run freely."""
        ...

    def stop_for_migration(self) -> int:
        """Stop the vCPUs and devices (run state finish-migrate).

        :return: CLOCK_REALTIME in ns at which the last vCPU had left guest mode.
        """
        ...

    def resume(self) -> int:
        """Run the guest, after an incoming migration or a failed one (run state running, or as it was
        before). When it raises, no vCPU runs.

        :return: CLOCK_REALTIME in ns just before the first guest instruction.
        """
        ...

    def leave_in_doubt(self) -> None:
        """Nobody can say whether the guest runs at the other end, or one that came cannot be started: it stays stopped (run state
        paused, or as it was before), until its user says otherwise.
        """
        ...

    def migrated_away(self) -> None:
        """All of the guest is elsewhere (run state postmigrate): whether it may run here again, `ownership` says."""
        ...

    def save_devices(self) -> list[DeviceState]:
        """The state of CPUs and devices, in the order the destination loads it. The guest is stopped."""
        ...

    def load_devices(self, states: Sequence[DeviceState], ignored: Collection[str] = ()) -> None:
        """Load what `save_devices` made. All or nothing: the states are checked before the first is applied.

        :param ignored: names of sections of which what has no place here does not matter
        :raise StreamError: When a section is missing, unknown or of the wrong shape; names section and field.
        """
        ...

    def judge_section(self, state: DeviceState) -> Judgement:
        """Whether the guest can do without a device of the source's that this machine has not."""
        ...

    def judge_ram_block(self, name: str, size: int) -> RamUse | None:
        """What the guest sees of a RAM block of the source's that this machine has not; None when it cannot do without it."""
        ...

    def announce(self, delays: Sequence[float]) -> None:
        """The guest has come here: its networks are told as soon as it runs.

        :param delays: seconds before each time
        """
        ...

    def advance_counter(self, elapsed_ns: int) -> None:
        """The guest was down for so long: its counter jumps by it, as one that never stopped would have."""
        ...
