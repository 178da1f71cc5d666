"""PSCI: the calls by which a guest starts and stops its CPUs and itself (ARM DEN 0022, over `hvc`)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Protocol

from sterna.hypervisor.interface import SystemEvent

_VERSION_1_1 = 0x0001_0001
_AFFINITY = 0x00FF_FFFF


class Function(IntEnum):
    """Function identifiers, 32-bit calling convention (5.1)."""

    VERSION = 0x8400_0000
    CPU_SUSPEND = 0x8400_0001
    CPU_OFF = 0x8400_0002
    CPU_ON = 0x8400_0003
    AFFINITY_INFO = 0x8400_0004
    MIGRATE_INFO_TYPE = 0x8400_0006
    SYSTEM_OFF = 0x8400_0008
    SYSTEM_RESET = 0x8400_0009
    FEATURES = 0x8400_000A


class Result(IntEnum):
    """Return codes (5.2.2), which are negative numbers of 32 bits."""

    SUCCESS = 0
    NOT_SUPPORTED = 0xFFFF_FFFF
    INVALID_PARAMETERS = 0xFFFF_FFFE
    ALREADY_ON = 0xFFFF_FFFC
    ON_PENDING = 0xFFFF_FFFB


class PsciCpu(Protocol):
    """A CPU that PSCI can start."""

    powered_off: bool

    @property
    def power_lock(self) -> AbstractContextManager[object]:
        """Held by who decides whether to start it."""
        ...

    @property
    def starting(self) -> bool:
        """Told to start, not running yet."""
        ...

    def power_on(self, entry: int, context: int) -> None:
        """Start at `entry` (bit 0: Thumb) with `context` in r0."""
        ...


_NO_MIGRATION_NEEDED = 2
_AFFINITY_ON, _AFFINITY_OFF, _AFFINITY_ON_PENDING = 0, 1, 2


def call(
    function: int,
    arguments: Sequence[int],
    cpus: Sequence[PsciCpu],
    caller: PsciCpu,
    system_event: Callable[[SystemEvent], None],
) -> int:
    """Serve one call: the value for the caller's r0, as an unsigned 32-bit number.

    :param arguments: r1 to r3 of the caller
    :param system_event: told when the guest switches itself off or resets
    """
    if function == Function.VERSION:
        return _VERSION_1_1
    if function == Function.MIGRATE_INFO_TYPE:
        return _NO_MIGRATION_NEEDED
    if function == Function.FEATURES:
        return Result.SUCCESS if arguments[0] in Function.__members__.values() else Result.NOT_SUPPORTED
    if function == Function.CPU_SUSPEND:
        return Result.SUCCESS
    if function == Function.CPU_OFF:
        caller.powered_off = True
        return Result.SUCCESS
    if function in (Function.SYSTEM_OFF, Function.SYSTEM_RESET):
        off = function == Function.SYSTEM_OFF
        system_event(SystemEvent.SHUTDOWN if off else SystemEvent.RESET)
        return Result.SUCCESS
    if function in (Function.CPU_ON, Function.AFFINITY_INFO):
        index = arguments[0] & _AFFINITY
        if index >= len(cpus):
            return Result.INVALID_PARAMETERS
        if function == Function.AFFINITY_INFO:
            if cpus[index].starting:
                return _AFFINITY_ON_PENDING
            return _AFFINITY_OFF if cpus[index].powered_off else _AFFINITY_ON
        with cpus[index].power_lock:
            if cpus[index].starting:
                return Result.ON_PENDING
            if not cpus[index].powered_off:
                return Result.ALREADY_ON
            cpus[index].power_on(arguments[1], arguments[2])
            return Result.SUCCESS
    return Result.NOT_SUPPORTED
