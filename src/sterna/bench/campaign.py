"""Workload after workload: every variant in turn, another one first each time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from sterna.bench.ceiling import measure_ceiling
from sterna.bench.errors import BenchError
from sterna.bench.image import guest_image
from sterna.bench.machines import Unavailable, machine_pair
from sterna.bench.migration import Measurement, RunOutcome, migrate
from sterna.bench.workloads import MEBIBYTE, Variant, Who, Workload
from sterna.guests.catalog import GuestError, validate
from sterna.guests.layout import WORK_OFFSET
from sterna.launch.errors import LaunchError
from sterna.launch.qemu import Qemu
from sterna.machine.config import ConfigError, MachineConfig

_GIVE_UP_AFTER = 2
"""Runs that did not converge after which a variant is not run again: nothing about it changes."""
_ROUND = 2 * MEBIBYTE


@dataclass(frozen=True)
class CampaignSettings:
    """:ivar memory_bytes: of the guests; None leaves each workload its own
    :ivar timeout: seconds after which a migration is cancelled
    :ivar accel: the hypervisor of the guests that are sterna's
    :ivar qemu: the QEMU beside it; None when there is none
    """

    runs: int = 5
    memory_bytes: int | None = None
    timeout: float = 60.0
    accel: str = "emulated"
    qemu: Qemu | None = None


@dataclass
class Series:
    """What the runs of one variant with one workload gave.

    :ivar unavailable: why there are none
    """

    variant: Variant
    measurements: list[Measurement] = field(default_factory=list)
    unavailable: str = ""

    @property
    def hopeless(self) -> bool:
        """Whether more runs would tell nothing new."""
        diverged = sum(one.outcome is RunOutcome.DIVERGED for one in self.measurements)
        return bool(self.unavailable) or diverged >= _GIVE_UP_AFTER


@dataclass(frozen=True)
class Comparison:
    """The series of one workload.

    :ivar append: the guest's arguments
    """

    workload: Workload
    config: MachineConfig
    series: tuple[Series, ...]


def guest_config(workload: Workload, memory_bytes: int | None, accel: str = "emulated") -> MachineConfig:
    """The machine of a workload; another size of memory scales what its guest writes.

    :raise GuestError, ConfigError: When such a guest cannot be.
    """
    size = workload.memory_bytes if memory_bytes is None else memory_bytes
    share = max(0, size - WORK_OFFSET) / (workload.memory_bytes - WORK_OFFSET)
    load = workload.load and workload.load.scaled(share)
    kernel, append = ("dirtyram", str(load)) if load else ("clock", "")
    config = MachineConfig(memory_bytes=size, kernel=kernel, append=append, accel=accel)
    validate(kernel, append, memory_bytes=size, board=config.machine)
    return config


def compare(
    workload: Workload,
    variants: Sequence[Variant],
    settings: CampaignSettings,
    check: Callable[[], None],
    note: Callable[[str], None],
) -> Comparison:
    """Measure one workload with every variant that fits it.

    :param check: called now and then; may raise
    :param note: is told of each measurement
    :raise BenchError: When the workload's guest cannot be.
    """
    try:
        config = guest_config(workload, settings.memory_bytes, settings.accel)
    except (GuestError, ConfigError) as error:
        raise BenchError(f"{workload.name}: {error}") from error
    series = [Series(variant) for variant in variants if variant.fits(workload)]
    assert config.kernel is not None
    base = int(config.board.ram_base)
    with guest_image(config.kernel, config.machine, base, config.memory_bytes, workload.content) as path:
        for number, one in _turns(series, settings.runs):
            if one.hopeless:
                continue
            measured = _measure(one, workload, config, path, settings, check)
            what = one.unavailable if measured is None else _in_words(measured)
            note(f"{workload.name}, run {number + 1} of {settings.runs}, {one.variant.name}: {what}")
    return Comparison(workload, config, tuple(series))


def _turns(series: list[Series], runs: int) -> Iterator[tuple[int, Series]]:
    for number in range(runs):
        first = number % len(series) if series else 0
        for one in series[first:] + series[:first]:
            yield number, one


def _measure(
    series: Series,
    workload: Workload,
    config: MachineConfig,
    path: str,
    settings: CampaignSettings,
    check: Callable[[], None],
) -> Measurement | None:
    check()
    variant = series.variant
    try:
        if variant.who is Who.RAW:
            measured = measure_ceiling(config.memory_bytes // _ROUND * _ROUND, variant.channels, check)
        else:
            guest = replace(config, kernel=path, dirty_log=variant.dirty_log)
            binary = settings.qemu.path if settings.qemu else ""
            with machine_pair(variant, workload, guest, binary, check) as vms:
                base, limit = int(config.board.ram_base), workload.downtime_limit_ms
                measured = migrate(*vms, base, limit, settings.timeout, check)
    except Unavailable as error:
        series.unavailable = str(error)
        return None
    except (BenchError, LaunchError) as error:
        measured = Measurement(RunOutcome.FAILED, 0.0, error=str(error))
    series.measurements.append(measured)
    return measured


def _in_words(measured: Measurement) -> str:
    if measured.outcome is RunOutcome.COMPLETED:
        return f"{measured.seconds:.2f} s, {measured.bytes / measured.seconds / 1e9:.2f} GB/s"
    reason = f": {measured.error}" if measured.error else ""
    return f"{measured.outcome.value}{reason}{f'; {measured.host}' if measured.host else ''}"
