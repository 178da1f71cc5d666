"""The host takes memory from the guest while it migrates."""

from dataclasses import dataclass

from sterna.launch.errors import Unsupported, VmError
from sterna.launch.process import VmProcess
from sterna.testbed.bed import Bed, ScenarioContext
from sterna.testbed.evidence import Evidence, ProgressSample
from sterna.testbed.guest import ObservedGuest
from sterna.testbed.migration import Migration
from sterna.testbed.procedures.cancel import huge_pages
from sterna.testbed.procedures.procedure import BaseProcedure
from sterna.testbed.resources import MemoryGroup, swapped_bytes, use_swap_file
from sterna.testbed.settings import Share

_SWAP_FACTOR = 3
_SWAP_SECONDS = 30.0
_PIECES = 8


class Reclaim(BaseProcedure, tag="reclaim", frozen=True):
    """Before the migration and during it: stage-2 entries are aged and taken away, pages go to a swap file.

    :ivar share: of the source's memory that it may keep
    """

    share: Share = 0.7

    def run(self, context: ScenarioContext, evidence: Evidence) -> None:
        bed = context.bed
        guest = context.guest
        source = bed.source(context.vm)
        pressure = _pressure(bed, context.vm.memory_bytes, evidence)
        if pressure is not None:
            pressure.add(source.pid)
        destination = bed.destination(context.vm)
        bed.warm_up(source, guest)
        destination.ready()
        notifier = _Notifier(guest, source)
        swapped = 0
        if pressure is not None:
            bed.say("the host lets the source keep less memory than it has")
            mapped = _mapped_mib(source)
            pressure.squeeze(round(pressure.usage() * self.share))
            bed.wait(lambda: swapped_bytes(source.pid) > 0, _SWAP_SECONDS, "nothing of the source is swapped")
            left = _mapped_mib(source)
            swapped = swapped_bytes(source.pid)
            evidence.reclaimed["MiB swapped before"] = swapped / (1 << 20)
        notifier.sample()
        if pressure is not None and notifier.reason and mapped is not None and left is not None:
            evidence.reclaimed["MiB of stage 2 taken by the kernel"] = mapped - left
        before = notifier.unmapped
        most = swapped

        def watch(sample: ProgressSample) -> None:
            nonlocal most
            if sample.status == "active":
                notifier.sample()
            most = max(most, swapped_bytes(source.pid))

        migration = Migration(context, source, destination, watch=watch)
        evidence.passages.append(migration.record)
        bed.say("migrate")
        migration.run()
        if pressure is not None:
            evidence.reclaimed["MiB swapped at most during"] = most / (1 << 20)
        if notifier.reason:
            evidence.skipped.append(notifier.reason)
        else:
            evidence.reclaimed["ranges unmapped before"] = before
            evidence.reclaimed["and during"] = notifier.unmapped - before
            evidence.reclaimed["leaves found young"] = notifier.young
        if context.vm.swap_bytes:
            evidence.reclaimed["MiB the guest wrote to its disk"] = _written(source) / (1 << 20)
        migration.arrive()


def _written(vm: VmProcess) -> int:
    """Bytes that a guest with swap space has written to its disks; it has little else to write."""
    try:
        return sum(int(disk["stats"]["wr_bytes"]) for disk in vm.command("query-blockstats"))
    except VmError:
        return 0  # it has no disks, so no swap space either


@dataclass
class _Notifier:
    """What a kernel's reclaim asks of a hypervisor: which pages were used, and to let go of some. Goes round RAM in pieces.

    :ivar unmapped: pieces that were let go of
    :ivar reason: why the VM does not do so when asked; empty when it does
    """

    guest: ObservedGuest
    vm: VmProcess
    unmapped: int = 0
    young: int = 0
    reason: str = ""

    def sample(self) -> None:
        """Age all of RAM, take away a piece."""
        if self.reason:
            return
        base, size = self.guest.ram_base, self.guest.ram_bytes
        piece = size // _PIECES
        start = base + self.unmapped % _PIECES * piece
        try:
            self.young += int(self.vm.command("x-sterna-age", val=base, size=size)["young"])
            self.vm.command("x-sterna-unmap", val=start, size=piece)
        except VmError as error:
            self.reason = str(error)
            return
        self.unmapped += 1


def _mapped_mib(vm: VmProcess) -> float | None:
    """How much stage 2 maps, in MiB; None when the VM does not tell."""
    found = huge_pages(vm)
    return None if found is None else found[0] * 2 + found[1] / 256


def _pressure(bed: Bed, size: int, evidence: Evidence) -> MemoryGroup | None:
    """A memory group, and a swap file for what it must do without; both go with the bed."""
    try:
        use_swap_file(bed.journal, bed.directory, size * _SWAP_FACTOR)
        return MemoryGroup(bed.journal)
    except Unsupported as error:
        evidence.skipped.append(f"memory group and swap file: {error}")
        return None
