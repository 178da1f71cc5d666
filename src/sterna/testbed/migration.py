"""One migration between two VMs, watched from outside."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from sterna.guests.layout import Status
from sterna.launch.errors import LaunchError
from sterna.launch.guestview import migration_gap, runs_beyond
from sterna.launch.process import VmProcess
from sterna.launch.watch import FINAL
from sterna.memory.address import PAGE_SIZE
from sterna.memory.digest import CHUNK_SIZE
from sterna.testbed.bed import Bed, ScenarioContext
from sterna.testbed.evidence import Blackout, HeatMapRecord, MigrationRecord, ProgressSample
from sterna.testbed.guest import ObservedGuest
from sterna.testbed.settings import MigrationSettings

if TYPE_CHECKING:
    from sterna.testbed.auditingproxy import AuditingProxy

_SAMPLE_SECONDS = 0.05
_ARRIVES_SECONDS = 30.0
_CANCEL_SECONDS = 10.0
_HEAT_CELLS = 1024


def prepare(bed: Bed, source: VmProcess, settings: MigrationSettings, *, endless: bool = False) -> None:
    """Set a source's capabilities and parameters.

    :param endless: let it not end before its downtime limit is changed
    """
    states = [{"capability": name, "state": True} for name in ("events", *settings.capabilities)]
    source.command("migrate-set-capabilities", capabilities=states)
    parameters: dict[str, Any] = {
        # Where the links keep to the rate, the VM need not.
        "max-bandwidth": 0 if bed.network.enforces_rate else bed.network.rate,
        "downtime-limit": settings.downtime_limit_ms,
    }
    if bed.kind.verifies:
        parameters["x-sterna-verify"] = "on" if settings.verify else "off"
        parameters["x-sterna-audit"] = settings.audit
    if endless:
        parameters |= bed.kind.endless
    source.command("migrate-set-parameters", **(parameters | settings.parameters))


class Observer:
    """Samples both ends' memory in turn, often: when did the guest stop at one, when did it start at the other?"""

    def __init__(self, guest: ObservedGuest, source: VmProcess, destination: VmProcess) -> None:
        self._guest = guest
        self._vms = source, destination
        self._samples: tuple[list[tuple[float, int]], ...] = ([], [])

    def sample(self) -> None:
        """Once at each end."""
        for vm, samples in zip(self._vms, self._samples, strict=True):
            samples.append((time.monotonic(), self._guest.pulse(vm)))

    def blackout_ms(self) -> tuple[float, float] | None:
        """How long no life was seen, and how far apart the samples were at its ends; None when it was not seen to go on."""
        at_source, at_destination = self._samples
        last = at_source[-1][1]
        stopped = next((index for index, (_, pulse) in enumerate(at_source) if pulse == last), 0)
        started = next((index for index, (_, pulse) in enumerate(at_destination) if pulse > last), None)
        if started is None or not stopped or not started:
            return None
        end, begin = at_destination[started][0], at_source[stopped][0]
        # It stopped between two samples of the source, and started between two at the destination.
        apart = (begin - at_source[stopped - 1][0]) + (end - at_destination[started - 1][0])
        middle = (begin + at_source[stopped - 1][0]) / 2, (end + at_destination[started - 1][0]) / 2
        return (middle[1] - middle[0]) * 1000, apart / 2 * 1000


class Migration:
    """From `start` until `poll` says that it is over; then `arrive`. Made when the guest works at its steady pace: from
    then to `start` it is measured how long this machine keeps it waiting without a migration.

    :ivar record: what was seen

    :param load: what the guest does, for people; empty: as the settings have it
    :param observe: sample both ends' memory often
    :param endless: let the guest not be stopped before `let_end`
    :param watch: called with each sample of query-migrate
    """

    def __init__(
        self,
        context: ScenarioContext,
        source: VmProcess,
        destination: VmProcess,
        *,
        name: str = "guest",
        load: str = "",
        observe: bool = False,
        endless: bool = False,
        watch: Callable[[ProgressSample], None] = lambda sample: None,
    ) -> None:
        self._bed = context.bed
        self._guest = context.guest
        self.source = source
        self.destination = destination
        self._settings = settings = context.migration
        self._watch = watch
        self._observer = Observer(self._guest, source, destination) if observe else None
        self._endless = endless or settings.passes > 0
        self._passes = 0 if endless else settings.passes
        self._next_sample = 0.0
        self._deadline = 0.0
        self._auditing_proxy: AuditingProxy | None = None
        self._settled = self._guest.mark(source)
        hosts = source.host.name, destination.host.name
        self.record = MigrationRecord(name, load or context.vm.load, *hosts, self._bed.now())

    def start(self) -> None:
        """Give the command."""
        prepare(self._bed, self.source, self._settings, endless=self._endless)
        self.record.jitter_ms = self._guest.jitter_ms(self._settled, self._guest.mark(self.source))
        self.record.began = self._bed.now()
        self._deadline = time.monotonic() + self._settings.timeout_s
        uri = self.destination.incoming_uri()
        if self._settings.audit and self.source.shared_ram is not None:
            # The proxy brings the compiler along, which other migrations do without.
            from sterna.testbed.auditingproxy import AuditingProxy

            self._auditing_proxy = AuditingProxy(self.destination.host, uri)
            uri = self._auditing_proxy.uri
        self.source.command("migrate", uri=uri)

    def poll(self) -> bool:
        """Take a sample.

        :return: whether it is over
        """
        if self._observer is not None:
            self._observer.sample()
        if time.monotonic() < self._next_sample:
            return False
        self._next_sample = time.monotonic() + _SAMPLE_SECONDS
        self.sample()
        # QEMU says that it is completed a moment before it has counted how long it took.
        counted = not self.record.completed or self.record.total_ms > 0
        if self.record.info.get("status") in FINAL and counted:
            self.record.ended = self._bed.now()
            self._ask_heat_maps()
            return True
        if time.monotonic() > self._deadline:
            self._give_up()
            return True
        return False

    def sample(self) -> ProgressSample:
        """What query-migrate says now."""
        info = self.source.command("query-migrate")
        self.record.info = info
        ram = info.get("ram", {})
        sample = ProgressSample(
            self._bed.now(),
            info.get("status", "none"),
            int(ram.get("dirty-sync-count", 0)),
            int(ram.get("transferred", 0)),
            int(ram.get("remaining", 0)),
            int(ram.get("dirty-pages-rate", 0)),
            float(ram.get("mbps", 0)),
        )
        self.record.moments.append(sample)
        if self._passes and sample.pass_number > self._passes:
            self._passes = 0
            self.let_end(self._settings.downtime_limit_ms)
        self._watch(sample)
        return sample

    def run(self) -> MigrationRecord:
        """`start`, and `poll` to the end."""
        self.start()
        while not self.poll():
            time.sleep(0.0005 if self._observer else _SAMPLE_SECONDS / 2)
        return self.record

    def let_end(self, limit_ms: int) -> None:
        """Stop the guest as soon as the downtime is within `limit_ms`."""
        self.source.command("migrate-set-parameters", **{"downtime-limit": limit_ms})

    def cancel(self) -> tuple[str, float]:
        """migrate_cancel: the outcome, and how many ms it took."""
        began = time.monotonic()
        self.source.command("migrate_cancel")
        self._bed.wait(
            lambda: self.sample().status in FINAL, _CANCEL_SECONDS, "the migration is not cancelled", 0.005
        )
        self.record.ended = self._bed.now()
        return str(self.record.info["status"]), (time.monotonic() - began) * 1000

    def arrive(self, *, hold: bool = False, check: bool = True) -> None:
        """After it completed: the guest goes on at the destination, as what it was.

        :param hold: the destination holds the guest back until RAM has been compared
        :param check: compare its memory with what its program must have written
        """
        record = self.record
        if not record.completed:
            if self._auditing_proxy is not None:
                self._auditing_proxy.cancel()
            return
        last = self._guest.mark(self.source)
        # A source without a way back is done when it has sent everything, not when that has arrived.
        late = "the destination did not take in the whole stream"
        self._bed.wait(self._taken_in, _ARRIVES_SECONDS, late, 0.002)
        if self._auditing_proxy is not None and (ram := self.source.shared_ram) is not None:
            record.chunks_forwarded, record.lost = self._auditing_proxy.compare(
                ram.block, ram.fd, self._guest.ram_base
            )
        if hold:
            self._compare()
            self.destination.command("cont")
        now = self._await(last)
        if now is None:
            return
        gap = migration_gap(last, now)
        if not hold:
            observed = self._observer.blackout_ms() if self._observer is not None else None
            record.blackout = Blackout(gap.ms, record.downtime_ms, *(observed or (None, 0.0)))
            record.guest_exact = gap.exact
        if check:
            record.pages_checked, record.content = self._guest.check(self.destination)
            if self._await(self._guest.mark(self.destination)) is None:
                record.problems.append("it does not go on after its memory was looked at")

    def _ask_heat_maps(self) -> None:
        if not self._bed.kind.counts_pages:
            return
        for told in self.source.command("x-sterna-query-page-heat", cells=_HEAT_CELLS):
            self.record.heat.append(
                HeatMapRecord(
                    told["block"], told["pages"], told["pages-per-cell"], told["sent"], told["most"]
                )
            )

    def _taken_in(self) -> bool:
        if self._observer is not None:
            self._observer.sample()
        return bool(self.destination.command("query-status")["status"] != "inmigrate")

    def _await(self, last: Status) -> Status | None:
        """The guest's account at the destination once it has run there beyond `last`; None when it does not."""

        def beyond() -> Status | None:
            if self._observer is not None:
                self._observer.sample()
            now = self._guest.mark(self.destination)
            return now if runs_beyond(last, now) else None

        stays = "the guest does not run at the destination"
        try:
            now = self._bed.wait(beyond, _ARRIVES_SECONDS, stays, 0.002)
        except LaunchError as error:
            self.record.problems.append(str(error))
            return None
        if self._observer is not None:
            self._observer.sample()
        return now

    def _compare(self) -> None:
        """Digests of RAM at both ends, where no guest runs; and where they differ, which pages."""
        base, size = self._guest.ram_base, self._guest.ram_bytes
        ends = [vm.digest(base, size).chunks for vm in (self.source, self.destination)]
        self.record.chunks_compared = len(ends[0])
        for chunk in (ends[0] != ends[1]).nonzero()[0]:
            start = base + int(chunk) * CHUNK_SIZE
            self.record.digest += self._differences(start, min(CHUNK_SIZE, base + size - start))

    def _differences(self, address: int, size: int) -> Iterator[str]:
        ends = [np.frombuffer(vm.memory(address, size), np.uint8) for vm in (self.source, self.destination)]
        differ = ends[0] != ends[1]
        for known in self._guest.written_by_host:
            differ[max(0, known.start - address) : max(0, known.stop - address)] = False
        pages = differ.reshape(-1, PAGE_SIZE).any(axis=1).nonzero()[0]
        if len(pages):
            first = address + int(differ.argmax())
            yield f"{len(pages)} pages of RAM differ in the 2 MiB at {address:#x}, the first byte at {first:#x}"

    def _give_up(self) -> None:
        """It took too long: the guest is to stay where it is."""
        seconds = self._settings.timeout_s
        status, _ = self.cancel()
        if status == "cancelled":
            self.record.info |= {
                "status": "failed",
                "error-desc": f"not done after {seconds:g} s; cancelled",
            }
