"""The parts of a scenario that any procedure needs, as its file gives them."""

from typing import Annotated

import msgspec

from sterna.host.units import parse_bandwidth
from sterna.machine.config import ConfigError, parse_memory
from sterna.migration.parameters import MAX_DOWNTIME_LIMIT_MS

Count = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Number = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=86_400_000)]
"""What numbers in a scenario file may be."""


class ScenarioTable(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", frozen=True):
    """A table in a scenario file."""


class VmSettings(ScenarioTable, frozen=True):
    """The VM under test.

    :ivar memory: size of RAM, such as ``1792M``
    :ivar program: what the guest does: `dirtyram`, `clock`, `random` or `net`
    :ivar arguments: the program's; without the address of `net`, which the procedure gives it
    :ivar swap: size of the guest's own swap space, if it has an operating system
    :ivar shared_ram: QEMU's: its RAM is a file that the test bed can look into, so that its migrations can be audited
    :ivar exact_memory: give the guest `memory` and no more, even where its VM is known to lose writes with that
    """

    memory: str = "64M"
    smp: Count = 1
    program: str = "dirtyram"
    arguments: str = ""
    swap: str = ""
    exact_memory: bool = False
    shared_ram: bool = False

    def __post_init__(self) -> None:
        try:
            parse_memory(self.memory)
            if self.swap:
                parse_memory(self.swap)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @property
    def memory_bytes(self) -> int:
        return parse_memory(self.memory)

    @property
    def swap_bytes(self) -> int:
        """0: none."""
        return parse_memory(self.swap) if self.swap else 0

    @property
    def load(self) -> str:
        """What the guest does, for people."""
        cpus = f", {self.smp} vCPUs" if self.smp > 1 else ""
        return f"{self.program} {self.arguments}".strip() + cpus


class NetworkSettings(ScenarioTable, frozen=True):
    """The links.

    :ivar rate: between any two hosts, such as ``1Gbit`` or ``unlimited``
    """

    rate: str = "1Gbit"

    def __post_init__(self) -> None:
        parse_bandwidth(self.rate)

    @property
    def bytes_per_second(self) -> int:
        """0 is no limit."""
        return parse_bandwidth(self.rate)


class MigrationSettings(ScenarioTable, frozen=True):
    """How migrations are done.

    :ivar passes: the guest is not stopped before so many, so that each page has had its chance to be missed
    :ivar verify: let VMs that can compare RAM by themselves, before the checks do
    :ivar audit: have the source audit every harvest of the dirty log, where it can
    :ivar capabilities: to switch on
    :ivar parameters: of migrate-set-parameters, by their names
    :ivar timeout_s: a migration that takes longer has failed
    """

    downtime_limit_ms: Annotated[int, msgspec.Meta(ge=0, le=MAX_DOWNTIME_LIMIT_MS)] = 300
    passes: Number = 0
    verify: bool = True
    audit: bool = False
    capabilities: list[str] = msgspec.field(default_factory=list)
    parameters: dict[str, bool | int | str] = msgspec.field(default_factory=dict)
    timeout_s: Positive = 120.0
