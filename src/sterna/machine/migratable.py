"""A machine as its migration sees it: what `sterna.migration.guest.MigratableGuest` asks."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from sterna.hypervisor.traits import Trait
from sterna.machine import sections, unmatched
from sterna.machine.clock import ns_to_counter
from sterna.machine.devices.device import Stopped
from sterna.machine.machine import Machine
from sterna.machine.runstate import MIGRATABLE, RunState, RunStateError, require
from sterna.memory.bitmap import DirtyBatch
from sterna.stream.unmatched import Judgement, RamUse
from sterna.stream.vmstate import DeviceState, VmStateDescription


class MigratableMachine:
    """A machine's guest, for its migrations. All it knows is the machine's, so there may be several for one machine.

    Its attributes are those of `Guest`.

    :ivar machine: the machine
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.machine_type = machine.config.board.machine_type
        self.page_bits = machine.config.board.page_bits
        self.uuid = None if machine.config.uuid is None else machine.config.uuid.bytes
        self.ram_blocks = machine.ram_blocks
        self.ownership = machine.ownership
        self.descriptions: Mapping[str, VmStateDescription] = {
            name: layout
            for device in machine.hardware.devices
            for name, layout in device.descriptions.items()
        }
        self._hardware = machine.hardware

    # -- what the guest needs ----------------------------------------------------------------------------------------------

    def check_migratable(self) -> None:
        """
        :raise RunStateError: When the machine has no guest to migrate: it has not come yet, or has left.
        """
        with self.machine.lock:
            if self.machine.run_state not in MIGRATABLE:
                raise RunStateError("migrate", self.machine.run_state, MIGRATABLE)

    def guest_traits(self) -> Sequence[Trait]:
        """What the guest needs of a host that it goes to."""
        return self._hardware.vm.guest_traits()

    def host_traits(self) -> Mapping[str, int]:
        """What this host has for a guest that comes."""
        return self._hardware.vm.host_traits()

    def judge_section(self, state: DeviceState) -> Judgement:
        """Whether the guest can do without a device of the source's."""
        return unmatched.judge_section(state)

    def judge_ram_block(self, name: str, size: int) -> RamUse | None:
        """What the guest sees of a RAM block of the source's that is not here; None when it cannot do without it."""
        return unmatched.judge_ram_block(name, size)

    # -- its RAM -----------------------------------------------------------------------------------------------------------

    def start_dirty_logging(self) -> None:
        """Log writes to RAM from now on.

        :raise RunStateError: When the machine has no guest to migrate.
        """
        self.check_migratable()
        self._hardware.ram.start_logging()

    def stop_dirty_logging(self) -> None:
        """Stop logging writes. The vCPUs stand still for it: what they wrote after the last look at the log would stay in small
        pages.
        """
        ram = self._hardware.ram
        if ram.logging:
            ram.harvest()  # while they run, so that the last look is a short one
        with self.machine.held():
            ram.stop_logging()

    def harvest(self) -> list[DirtyBatch]:
        """Take the dirty log."""
        return [self._hardware.ram.harvest()]

    def peek_dirty_log(self) -> list[DirtyBatch]:
        """What the dirty log holds, which stays there."""
        return [self._hardware.ram.peek()]

    def locate(self, block: str, page: int) -> tuple[int, int]:
        """Slot and guest physical address of a page of RAM."""
        return self._hardware.ram.locate(page)

    # -- its CPUs ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def held(self) -> Iterator[None]:
        """No vCPU runs and no device touches RAM."""
        with self.machine.held():
            running = self.machine.run_state is RunState.RUNNING
            if running:
                self._hardware.pause_devices()
            try:
                yield
            finally:
                if running:
                    self._hardware.resume_devices()

    def positions(self) -> Sequence[int]:
        """The program counters."""
        return [self._hardware.platform.position(cpu) for cpu in range(self.machine.config.smp)]

    def throttle(self, percent: int) -> None:
        """Slow the vCPUs down."""
        self._hardware.throttle.set(percent)

    # -- the switchover ----------------------------------------------------------------------------------------------------

    def stop_for_migration(self) -> int:
        """Stop the guest for the switchover.

        :return: CLOCK_REALTIME in ns when the last vCPU had left guest mode
        :raise RunStateError: When the machine has no guest of its own.
        """
        machine = self.machine
        with machine.lock, machine.migration.collector.until_error():
            before = machine.run_state
            stopped_at = time.clock_gettime_ns(time.CLOCK_REALTIME)
            if before is RunState.RUNNING:
                stopped_at = machine.pause(RunState.FINISH_MIGRATE)
            if machine.run_state is not RunState.FINISH_MIGRATE:
                before = machine.run_state  # a guest that has ended or is broken migrates as that
                machine.enter(RunState.FINISH_MIGRATE)
            machine.migration.before = before
            return stopped_at

    def resume(self) -> int:
        """Go on after an incoming migration, or one that failed: as the source was, as this machine was.

        :return: CLOCK_REALTIME in ns just before the first guest instruction
        :raise RunStateError: When the machine is not in a migration, or its guest has not arrived.
        """
        machine = self.machine
        with machine.lock:
            require("resume", machine.run_state, RunState.FINISH_MIGRATE, RunState.INMIGRATE)
            machine.migration.collector.release()
            if machine.run_state is RunState.INMIGRATE:
                target = self._state_after_incoming()
            else:
                target = machine.migration.before
                if target is RunState.RUNNING and machine.ownership.may_run:
                    machine.stopped_counter = None  # it never stood still
            if target is RunState.RUNNING:
                return machine.run()
            machine.ownership.require_owner()
            machine.enter(target)
            return time.clock_gettime_ns(time.CLOCK_REALTIME)

    def _state_after_incoming(self) -> RunState:
        machine = self.machine
        if machine.migration.arrived is None:
            raise RunStateError("resume a guest that has not arrived", machine.run_state, frozenset())
        target = machine.migration.arrived.run_state or RunState.RUNNING
        if target is RunState.INTERNAL_ERROR:
            machine.error = "the guest was broken before it migrated here"
        return RunState.PAUSED if target is RunState.RUNNING and not machine.migration.start else target

    def leave_in_doubt(self) -> None:
        """Nobody can say whether the guest runs elsewhere, or one that came cannot be started: it stays stopped here, until its
        user says otherwise.
        """
        machine = self.machine
        with machine.lock:
            require("leave the migration", machine.run_state, RunState.FINISH_MIGRATE, RunState.INMIGRATE)
            came = machine.run_state is RunState.INMIGRATE
            before = self._state_after_incoming() if came else machine.migration.before
            machine.enter(RunState.PAUSED if before is RunState.RUNNING else before)
            machine.migration.collector.release()

    def migrated_away(self) -> None:
        """All of the guest is elsewhere; whether it may run here again, `ownership` says."""
        machine = self.machine
        with machine.lock:
            if machine.ownership.may_run:
                raise RunStateError("leave a guest that is here", machine.run_state, frozenset())
            machine.enter(RunState.POSTMIGRATE)
            machine.migration.collector.release()

    # -- its CPUs and devices ----------------------------------------------------------------------------------------------

    def save_devices(self) -> list[DeviceState]:
        """The sections of CPUs and devices.

        :raise RunStateError: When the guest is not stopped for a migration.
        """
        machine = self.machine
        with machine.lock:
            require("save the devices", machine.run_state, RunState.FINISH_MIGRATE)
            assert machine.stopped_counter is not None
            stopped = Stopped(machine.stopped_counter, machine.migration.before)
            return sections.save(self._hardware.devices, stopped)

    def load_devices(self, states: Sequence[DeviceState], ignored: Collection[str] = ()) -> None:
        """Take over CPUs and devices: all, or on an error none.

        :param ignored: names of sections of which what has no place here does not matter
        :raise StreamError: When a section is missing, unknown, or does not fit this machine.
        :raise RunStateError: When the machine does not wait for a guest.
        """
        machine = self.machine
        with machine.lock, machine.migration.collector.until_error():
            require("load the devices", machine.run_state, RunState.INMIGRATE)
            stopped = Stopped(ignored=ignored)
            board, smp = machine.config.board.name, machine.config.smp
            sections.load(states, self._hardware.devices, stopped, board, smp)()
            machine.stopped_counter = stopped.counter
            machine.migration.arrived = stopped

    def announce(self, delays: Sequence[float]) -> None:
        """Tell the guest's networks that it is here, from when it runs."""
        for device in self._hardware.devices:
            device.announce(delays)

    def advance_counter(self, elapsed_ns: int) -> None:
        """The guest ran until `elapsed_ns` ago: let its counter jump by that. A guest that was paused lost no time."""
        machine = self.machine
        with machine.lock:
            require("advance the counter", machine.run_state, RunState.INMIGRATE)
            arrived = machine.migration.arrived
            if arrived is None or arrived.run_state not in (None, RunState.RUNNING):
                return
            assert machine.stopped_counter is not None
            machine.stopped_counter += ns_to_counter(max(elapsed_ns, 0), self._hardware.vm.counter_hz)
