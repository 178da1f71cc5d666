"""The two hypervisors as pairs of processes: started as a user would, driven through QMP alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from sterna.bench.errors import BenchError
from sterna.bench.workloads import Variant, Who, Workload
from sterna.launch.command import qemu_arguments, sterna_arguments
from sterna.launch.errors import VmError
from sterna.launch.process import QemuProcess, SternaProcess, VmProcess
from sterna.machine.config import MachineConfig

# What stands for no limit: QEMU takes 0 as it is meant since 8.2 only.
_NO_LIMIT = {Who.STERNA: 0, Who.QEMU: 1 << 40}


class Unavailable(BenchError):
    """A hypervisor does not have what a variant needs; one line."""


@contextmanager
def machine_pair(
    variant: Variant, workload: Workload, config: MachineConfig, qemu: str, check: Callable[[], None]
) -> Iterator[tuple[VmProcess, VmProcess]]:
    """A source whose guest runs, and a destination that waits for it, with their capabilities and parameters set.

    Where the guest has memory, so has the destination in advance: what it costs the host to give memory for the first time
    is not the migration's, and here and there many times as much.

    :param config: of the source; its kernel is the path of an image
    :param qemu: the program of a QEMU
    :param check: called now and then; may raise
    :raise Unavailable: When a capability or a parameter of the variant is refused.
    :raise VmError: When a process does not start.
    """
    make = partial(_start, "" if variant.who is Who.STERNA else qemu)
    # What an idle guest has never touched is not to be touched at the destination either.
    waiting = replace(config, incoming=True, preallocated=workload.touches_ram)
    with make("source", config) as source, make("destination", waiting) as destination:
        for vm in (source, destination):
            vm.ready(check)
        limits = {
            "max-bandwidth": workload.bandwidth or _NO_LIMIT[variant.who],
            "downtime-limit": workload.downtime_limit_ms,
        }
        source.command("migrate-set-parameters", **limits)
        try:
            for vm in (source, destination):
                states = [{"capability": name, "state": True} for name in ("events", *variant.capabilities)]
                vm.command("migrate-set-capabilities", capabilities=states)
                if variant.parameters:
                    vm.command("migrate-set-parameters", **variant.parameters)
        except VmError as error:
            raise Unavailable(str(error)) from error
        destination.command("migrate-incoming", uri="tcp:127.0.0.1:0")
        yield source, destination


def _start(qemu: str, name: str, config: MachineConfig) -> VmProcess:
    incoming = "defer" if config.incoming else None
    if qemu:
        return QemuProcess(f"QEMU {name}", qemu, qemu_arguments(config, incoming=incoming, serial="null"))
    return SternaProcess(name, sterna_arguments(config, incoming=incoming, serial="null"))
