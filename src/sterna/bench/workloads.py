"""What is measured: the table of workloads, and the table of ways to migrate them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from sterna.hypervisor.interface import DirtyLogMode

MEBIBYTE = 1 << 20
GBIT = 125_000_000


class Content(Enum):
    """What an idle guest's RAM holds besides the program."""

    NONE = "untouched"
    """Nothing: the host has given no memory for it."""
    ZERO = "zero"
    """Zeros that were written, in memory of their own."""
    RANDOM = "random"


@dataclass(frozen=True)
class Load:
    """The arguments of `dirtyram`, for the memory that the workload's guest has when nobody chooses another.

    :ivar random_words: of each page that it writes
    """

    pages: int
    pages_per_step: int
    sleep_ms: int
    random_words: int = 0

    def scaled(self, share: float) -> "Load":
        """The same load on a guest with `share` of the memory: as many times over it in a second."""
        pages = max(1, round(self.pages * share))
        return replace(
            self, pages=pages, pages_per_step=min(pages, max(1, round(self.pages_per_step * share)))
        )

    def __str__(self) -> str:
        words = f" {self.random_words}" if self.random_words else ""
        return f"{self.pages} {self.pages_per_step} {self.sleep_ms}{words}"


@dataclass(frozen=True)
class Workload:
    """A guest and the limits of its migration.

    :ivar memory_bytes: of the guest, when nobody chooses another size
    :ivar load: what the guest writes; None is an idle guest, which prints a line a second
    :ivar bandwidth: bytes per second, 0 for no limit
    :ivar quick: whether `--quick` measures it
    """

    name: str
    title: str
    memory_bytes: int
    load: Load | None = None
    content: Content = Content.NONE
    bandwidth: int = 0
    downtime_limit_ms: int = 300
    quick: bool = False

    @property
    def idle(self) -> bool:
        return self.load is None

    @property
    def touches_ram(self) -> bool:
        """Whether the host has given most of the guest's memory."""
        return not self.idle or self.content is not Content.NONE


_MILD, _SEED, _HARD = Load(51200, 128, 20), Load(102580, 812, 30), Load(409600, 8192, 5)
# Whole pages of random words: nothing that is sent of them can be left out. 25 and 70 MB/s.
_RANDOM_25, _RANDOM_70 = Load(102580, 183, 30, 511), Load(102580, 513, 30, 511)
_LARGE, _USUAL = 2048 * MEBIBYTE, 1792 * MEBIBYTE

WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("idle-random", "idle, random content", _LARGE, content=Content.RANDOM, quick=True),
        Workload("idle-zero", "idle, RAM never touched", _LARGE, quick=True),
        Workload("idle-zeroed", "idle, zeros in memory of their own", _LARGE, content=Content.ZERO),
        Workload("mild-1g", f"dirtyram {_MILD}, 1 Gbit/s", _USUAL, _MILD, bandwidth=GBIT),
        Workload("dirty-1g", f"dirtyram {_SEED}, 1 Gbit/s", _USUAL, _SEED, bandwidth=GBIT, quick=True),
        Workload("dirty", f"dirtyram {_SEED}", _USUAL, _SEED),
        Workload(
            "random-25-1g",
            f"dirtyram {_RANDOM_25}: 25 MB/s of random words, 1 Gbit/s",
            _USUAL,
            _RANDOM_25,
            bandwidth=GBIT,
            quick=True,
        ),
        Workload(
            "random-70-1g",
            f"dirtyram {_RANDOM_70}: 70 MB/s of random words, 1 Gbit/s",
            _USUAL,
            _RANDOM_70,
            bandwidth=GBIT,
        ),
        Workload("hard-1g", f"dirtyram {_HARD}, 1 Gbit/s", _USUAL, _HARD, bandwidth=GBIT),
        Workload("hard", f"dirtyram {_HARD}", _USUAL, _HARD),
    )
}
"""The workloads by name, in the order in which they are measured."""


class Who(Enum):
    """What moves the bytes."""

    STERNA = "sterna"
    QEMU = "qemu"
    RAW = "raw"
    """No virtual machine: two processes, `sendall` and `recv_into`."""


@dataclass(frozen=True)
class Variant:
    """One way to migrate.

    :ivar capabilities: to switch on, by QEMU's names
    :ivar parameters: to set at the source, by QEMU's names
    :ivar channels: connections that carry pages
    :ivar idle, loaded: whether it is measured with idle guests, and with guests that write
    :ivar quick: whether `--quick` measures it
    :ivar dirty_log: how the hypervisor keeps its dirty log
    """

    name: str
    who: Who
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, int | str] = field(default_factory=dict)
    channels: int = 1
    idle: bool = True
    loaded: bool = True
    quick: bool = False
    dirty_log: str = DirtyLogMode.BITMAP

    def fits(self, workload: Workload) -> bool:
        """Whether it is measured with a workload. A ceiling is only told of what cannot be made smaller."""
        if self.who is Who.RAW:
            return workload.content is Content.RANDOM
        return self.idle if workload.idle else self.loaded


_CACHE: Mapping[str, int | str] = {"xbzrle-cache-size": 2048 * MEBIBYTE}
_TWO: Mapping[str, int | str] = {"multifd-channels": 2}
_UNTHROTTLED: Mapping[str, int | str] = {"x-sterna-max-throttle": 0}
_UNVERIFIED: Mapping[str, int | str] = {"x-sterna-verify": "off"}

VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("sterna", Who.STERNA, quick=True),
        Variant("sterna unthrottled", Who.STERNA, parameters=_UNTHROTTLED, idle=False),
        Variant("sterna unverified", Who.STERNA, parameters=_UNVERIFIED),
        Variant("sterna multifd", Who.STERNA, ("multifd",), _TWO, channels=2),
        Variant("sterna multifd unverified", Who.STERNA, ("multifd",), {**_TWO, **_UNVERIFIED}, channels=2),
        Variant("sterna xbzrle", Who.STERNA, ("xbzrle",), _CACHE, idle=False),
        Variant("qemu", Who.QEMU, quick=True),
        Variant("qemu multifd", Who.QEMU, ("multifd",), _TWO, channels=2),
        Variant("qemu xbzrle", Who.QEMU, ("xbzrle",), _CACHE, idle=False),
        Variant("qemu auto-converge", Who.QEMU, ("auto-converge",), idle=False),
        Variant("qemu xbzrle auto-converge", Who.QEMU, ("xbzrle", "auto-converge"), _CACHE, idle=False),
        Variant("raw", Who.RAW, quick=True),
        Variant("raw 2", Who.RAW, channels=2),
    )
}
"""The variants by name. Each is measured in turn, and another one is first each time."""

KVM_VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        *(Variant(mode.value, Who.STERNA, dirty_log=mode, quick=True) for mode in DirtyLogMode),
        Variant("raw", Who.RAW, quick=True),
    )
}
"""Those of `--accel kvm`: each way that the kernel keeps a dirty log."""
