"""A machine: a board, its RAM, CPUs and devices on a hypervisor, and the states it goes through."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from sterna.hypervisor.accelerator import check_arch, open_vm
from sterna.hypervisor.interface import DirtyLogMode, Exit, ExitReason, SystemEvent
from sterna.hypervisor.traits import Trait
from sterna.machine import devicetree, kernel, sections
from sterna.machine.clock import Clock, ns_to_counter
from sterna.machine.collector import CollectorHold
from sterna.machine.config import ConfigError, MachineConfig
from sterna.machine.cpus import CpuThreads
from sterna.machine.devices.device import Device, Stopped
from sterna.machine.devices.pl011 import Pl011
from sterna.machine.globalstate import GlobalState
from sterna.machine.guestram import GuestRam
from sterna.machine.loader import Image, place
from sterna.machine.platforms.factory import create_platform
from sterna.machine.runstate import MIGRATABLE, RunState, RunStateError, require, transition
from sterna.machine.serial import NullSerial, SerialBackend, open_serial
from sterna.machine.state import absent
from sterna.machine.throttle import Throttle
from sterna.machine.virtio.bus import VirtioBus
from sterna.machine.virtio.net import on_tap
from sterna.memory.bitmap import DirtyBatch
from sterna.memory.ram import RamBlock, RamError
from sterna.ownership import Event, Ownership, Standing
from sterna.stream.leftover import Judgement, RamUse
from sterna.stream.vmstate import DeviceState, VmStateDescription

log = logging.getLogger(__name__)

Listener = Callable[[str, dict[str, Any]], None]
"""Takes an event: its name and data, as QMP has them. Called with the machine's lock held; must not wait for the machine."""


_ENDED = frozenset({RunState.SHUTDOWN, RunState.INTERNAL_ERROR})
"""States of a guest that does not go on."""


@dataclass(frozen=True)
class CpuInfo:
    """A vCPU.

    :ivar thread_id: the host's id of its thread
    """

    index: int
    thread_id: int


class Machine:
    """A virtual machine. It comes up in state prelaunch, or inmigrate when it waits for a guest; `cont` starts it.

    The guest's counter stands still while the machine is paused. It does not while a migration is under way: if that
    fails, the guest goes on as if it had only been slow.

    :ivar config: its settings
    :ivar serial: the far end of the first UART
    :ivar devices: all that is saved of it but its RAM, in the order of the stream
    :ivar ownership: whether the guest is this machine's; every start of the vCPUs asks it
    :ivar error: what stopped the guest, when it was not told to stop: fault, address, pc in the first line, then registers

    :raise ConfigError: When the host cannot give the RAM.
    :raise LoadError: When the kernel cannot be loaded.
    :raise GuestError: When there is no such guest program or it cannot run so.
    :raise SerialError: When the serial line cannot be opened.
    :raise TapError: When a network card's tap cannot be opened.
    :raise Unsupported: When this host cannot have such a machine.
    :raise HypervisorError: When the hypervisor cannot make it for another reason.
    """

    def __init__(self, config: MachineConfig, prepare: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self.machine_type = config.board.machine_type
        self.page_bits = config.board.page_bits
        self.uuid = None if config.uuid is None else config.uuid.bytes
        self.error: str | None = None
        self.ownership = Ownership(Standing.ABSENT if config.incoming else Standing.OWNER)
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []
        self._collector = CollectorHold()
        self._run_state = RunState.INMIGRATE if config.incoming else RunState.PRELAUNCH
        self._before_migration = self._run_state
        self._incoming: Stopped | None = None
        self._start_after_incoming = not config.paused
        # The counter while it stands still; None while it runs.
        self._stopped_counter: int | None = 0
        with ExitStack() as stack:
            self._build(stack, prepare)
            self._resources = stack.pop_all()

    def _build(self, stack: ExitStack, prepare: Callable[[], None]) -> None:
        config, board = self.config, self.config.board
        check_arch(config.accel, board.isa)
        boot = None
        if config.kernel is not None and not config.incoming:
            device_tree = devicetree.build(config)
            boot = kernel.find(config, board.reserved_bytes(len(device_tree))), device_tree
        try:
            ram = RamBlock(board.ram_name, config.memory_bytes, populated=config.preallocated)
            block = stack.enter_context(ram)
        except RamError as error:
            raise ConfigError(f"memory: {error}") from error
        with ExitStack() as line:
            self.serial: SerialBackend = open_serial(config.serial)
            line.callback(self.serial.close)
            prepare()
            self._vm = open_vm(
                config.accel,
                board.isa,
                vcpus=config.smp,
                dirty_log=DirtyLogMode(config.dirty_log),
                secondaries_off=board.secondaries_off,
            )
            stack.callback(self._vm.close)
            # Opened before the VM, and closed before it too: input raises an interrupt at a vCPU.
            stack.enter_context(line.pop_all())
        self.ram_blocks: Sequence[RamBlock] = (block,)
        self._ram = GuestRam(
            self._vm, block, board.ram_base, initially_set=config.dirty_log == DirtyLogMode.MANUAL
        )
        self._platform = create_platform(self._vm, board, config.smp)
        lines = [self.serial, *(NullSerial() for _ in board.uarts[1:])]
        uarts = [
            Pl011(slot, line, self._platform.line(slot.irq), number)
            for number, (slot, line) in enumerate(zip(board.uarts, lines, strict=True))
        ]
        bus = VirtioBus(board.virtio, self._ram, self._platform.line)
        self.devices: Sequence[Device] = (
            Clock(self._vm.counter_hz),
            self._platform,
            *self._platform.devices,
            *uarts,
            GlobalState(),
            bus,
        )
        for device in self.devices:
            stack.callback(device.close)
        self._cards = [bus.add(on_tap(nic)) for nic in config.nics]
        for region in (region for device in self.devices for region in device.regions):
            self._vm.add_mmio(region.ipa, region.size, region.device)
        self.descriptions: Mapping[str, VmStateDescription] = {
            name: description for device in self.devices for name, description in device.descriptions.items()
        }
        if boot is not None:
            self._load(*boot)
        self._threads = CpuThreads(self._platform.vcpus, self._vcpu_left)
        stack.callback(self._threads.close)
        self._throttle = Throttle(self._threads)
        stack.callback(self._throttle.set, 0)
        # Last: it empties a file, which a machine that cannot be made must not do.
        self.serial.start(uarts[0].receive)

    def _load(self, image: Image, device_tree: bytes) -> None:
        place(image, device_tree, self.config.board, self._ram.write)
        self._platform.start(image.entry, self._ram)

    # -- run state and events ----------------------------------------------------------------------------------------------

    @property
    def run_state(self) -> RunState:
        """The state the machine is in."""
        return self._run_state

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Hand events to `listener`: STOP, RESUME, SHUTDOWN.

        :return: ends the subscription
        """
        with self._lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return unsubscribe

    def stop(self) -> None:
        """Pause the guest and its counter. Does nothing when it does not run."""
        with self._lock:
            match self._run_state:
                case RunState.RUNNING:
                    self._pause(RunState.PAUSED)
                case RunState.INMIGRATE:
                    self._start_after_incoming = False
                case RunState.FINISH_MIGRATE if self._before_migration is RunState.RUNNING:
                    self._before_migration = RunState.PAUSED
                case _:
                    pass

    def cont(self, *, force: bool = False) -> None:
        """Run the guest; its counter goes on from where it stood. Does nothing when it runs.

        In state inmigrate the guest will run as soon as it is there, whatever the settings say.

        :param force: the caller answers for it that the guest runs nowhere else
        :raise RunStateError: When the guest has ended or is broken.
        :raise NotTheOwner: When it runs elsewhere, or may.
        """
        with self._lock:
            if self._run_state is RunState.INMIGRATE:
                self._start_after_incoming = True
            elif self._run_state is not RunState.RUNNING:
                ended = self._run_state is RunState.POSTMIGRATE and self._before_migration in _ENDED
                state = self._before_migration if ended else self._run_state
                require("run the guest", state, RunState.PAUSED, RunState.PRELAUNCH, RunState.POSTMIGRATE)
                self.ownership.apply(Event.FORCED_CONT if force else Event.CONT)
                self._run()

    def shutdown(self) -> None:
        """End the guest: it never runs again. Does nothing when it has ended."""
        with self._lock:
            if self._run_state is RunState.RUNNING:
                self._pause(RunState.PAUSED)
            if self._run_state is not RunState.SHUTDOWN:
                self._run_state = transition(self._run_state, RunState.SHUTDOWN)
                self._emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})

    def close(self) -> None:
        """Stop the guest and free everything. Not to be called by a listener."""
        self._collector.release()
        self._resources.close()

    def __enter__(self) -> "Machine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _emit(self, event: str, data: dict[str, Any] | None = None) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(event, data or {})
            except Exception:  # what goes wrong there must not decide whether the guest runs
                log.exception("a listener failed at the event %s", event)

    def _run(self) -> int:
        """Go to state running. When it raises, nothing runs: the vCPUs' start is the last step.

        :return: CLOCK_REALTIME in ns just before the first guest instruction
        :raise NotTheOwner: When the guest is not this machine's.
        """
        self.ownership.require_owner()  # cards and events are the guest's too
        before, stopped_counter = self._run_state, self._stopped_counter
        self._run_state = transition(self._run_state, RunState.RUNNING)
        try:
            if stopped_counter is not None:
                self._vm.set_counter(stopped_counter)
                self._stopped_counter = None
            self._emit("RESUME")
            self._resume_devices()
            return self._start_vcpus()
        except BaseException:
            self._pause_devices()
            self._run_state, self._stopped_counter = before, stopped_counter
            raise

    def _start_vcpus(self) -> int:
        """The one place from which vCPUs go on."""
        self.ownership.require_owner()
        return self._threads.resume()

    def _pause(self, target: RunState) -> int:
        """Leave state running for `target`, or, if a vCPU had just stopped by itself, for what that means.

        :return: CLOCK_REALTIME in ns when the last vCPU had stopped
        """
        stopped_at = self._threads.pause()
        self._pause_devices()
        self._stopped_counter = self._vm.counter()
        own = self._threads.take_exits()
        if own:
            target = self._account_for(*own[0])
        self._run_state = transition(self._run_state, target)
        self._emit("STOP")
        return stopped_at

    def _pause_devices(self) -> None:
        for device in self.devices:
            device.pause()

    def _resume_devices(self) -> None:
        for device in self.devices:
            device.resume()

    def _account_for(self, index: int, leaving: Exit) -> RunState:
        """The state that a vCPU's own stop leads to."""
        if leaving.reason is ExitReason.SYSTEM_EVENT:
            # There is no reset: a guest that asks for one has ended, as with QEMU's -no-reboot.
            reset = leaving.event is SystemEvent.RESET
            self._emit("SHUTDOWN", {"guest": True, "reason": "guest-reset" if reset else "guest-shutdown"})
            return RunState.SHUTDOWN
        self.error = f"{leaving.detail or leaving.reason.name}\n{self._dump(index)}"
        return RunState.INTERNAL_ERROR

    def _vcpu_left(self) -> None:
        """A vCPU stopped by itself. On its thread."""
        with self._lock:
            if self._run_state is RunState.RUNNING and self._threads.exited:
                self._pause(RunState.PAUSED)

    # -- inspection --------------------------------------------------------------------------------------------------------

    def cpus(self) -> list[CpuInfo]:
        """The vCPUs."""
        return [CpuInfo(index, thread_id) for index, thread_id in enumerate(self._threads.thread_ids)]

    def registers(self, cpu: int) -> str:
        """A vCPU's registers as text. A running guest stops for a moment.

        :raise ValueError: When there is no such vCPU.
        """
        if not 0 <= cpu < self.config.smp:
            raise ValueError(f"CPU {cpu}: the machine has CPUs 0 to {self.config.smp - 1}")
        with self._held():
            return self._dump(cpu)

    def read_physical(self, ipa: int, size: int) -> bytes:
        """Guest RAM at a physical address.

        :raise AddressError: When the range is not in RAM.
        """
        return self._ram.read(ipa, size)

    def statistics(self) -> dict[str, int]:
        """The hypervisor's counters by name."""
        return dict(self._vm.statistics())

    def network_counts(self) -> dict[str, dict[str, int]]:
        """Frames that each network card has carried, by its tap and by what became of them (`FrameCounts`)."""
        return {card.network.name: asdict(card.counts) for card in self._cards}

    def unmap(self, ipa: int, size: int) -> None:
        """Take the mappings of a range of RAM away, as a host that reclaims memory does. As `GuestRam.unmap`."""
        self._ram.unmap(ipa, size)

    def age(self, ipa: int, size: int) -> int:
        """How many mappings of a range the guest has used since this was asked last. As `GuestRam.age`."""
        return self._ram.age(ipa, size)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """No vCPU runs, and the run state stays as it is."""
        with self._lock:
            running = self._run_state is RunState.RUNNING
            if running:
                self._threads.pause()
            try:
                yield
            finally:
                if running:
                    self._start_vcpus()

    def _dump(self, cpu: int) -> str:
        return self._platform.dump(cpu)

    # -- what migration asks (sterna.migration.guest) ----------------------------------------------------------------------

    def check_migratable(self) -> None:
        """
        :raise RunStateError: When the machine has no guest to migrate: it has not come yet, or has left.
        """
        with self._lock:
            if self._run_state not in MIGRATABLE:
                raise RunStateError("migrate", self._run_state, MIGRATABLE)

    def guest_traits(self) -> Sequence[Trait]:
        """What the guest needs of a host that it goes to."""
        return self._vm.guest_traits()

    def host_traits(self) -> Mapping[str, int]:
        """What this host has for a guest that comes."""
        return self._vm.host_traits()

    def start_dirty_logging(self) -> None:
        """Log writes to RAM from now on.

        :raise RunStateError: When the machine has no guest to migrate.
        """
        self.check_migratable()
        self._ram.start_logging()

    def stop_dirty_logging(self) -> None:
        """Stop logging writes."""
        self._ram.stop_logging()

    def harvest(self) -> list[DirtyBatch]:
        """Take the dirty log."""
        return [self._ram.harvest()]

    @contextmanager
    def held(self) -> Iterator[None]:
        """No vCPU runs and no card touches RAM."""
        with self._held():
            running = self._run_state is RunState.RUNNING
            if running:
                self._pause_devices()
            try:
                yield
            finally:
                if running:
                    self._resume_devices()

    def peek_dirty_log(self) -> list[DirtyBatch]:
        """Look at the dirty log and leave it."""
        return [self._ram.peek()]

    def positions(self) -> Sequence[int]:
        """The program counters."""
        return [self._platform.position(cpu) for cpu in range(self.config.smp)]

    def locate(self, block: str, page: int) -> tuple[int, int]:
        """Slot and guest physical address of a page of RAM."""
        return self._ram.locate(page)

    def throttle(self, percent: int) -> None:
        """Slow the vCPUs down."""
        self._throttle.set(percent)

    def stop_for_migration(self) -> int:
        """Stop the guest for the switchover.

        :return: CLOCK_REALTIME in ns when the last vCPU had left guest mode
        :raise RunStateError: When the machine has no guest of its own.
        """
        with self._lock, self._collector.until_error():
            before = self._run_state
            stopped_at = time.clock_gettime_ns(time.CLOCK_REALTIME)
            if before is RunState.RUNNING:
                stopped_at = self._pause(RunState.FINISH_MIGRATE)
            if self._run_state is not RunState.FINISH_MIGRATE:
                before = self._run_state  # a guest that has ended or is broken migrates as that
                self._run_state = transition(before, RunState.FINISH_MIGRATE)
            self._before_migration = before
            return stopped_at

    def resume(self) -> int:
        """Go on after an incoming migration, or one that failed: as the source was, as this machine was.

        :return: CLOCK_REALTIME in ns just before the first guest instruction
        :raise RunStateError: When the machine is not in a migration, or its guest has not arrived.
        """
        with self._lock:
            require("resume", self._run_state, RunState.FINISH_MIGRATE, RunState.INMIGRATE)
            self._collector.release()
            if self._run_state is RunState.INMIGRATE:
                target = self._state_after_incoming()
            else:
                target = self._before_migration
                if target is RunState.RUNNING and self.ownership.may_run:
                    self._stopped_counter = None  # it never stood still
            if target is RunState.RUNNING:
                return self._run()
            self.ownership.require_owner()
            self._run_state = transition(self._run_state, target)
            return time.clock_gettime_ns(time.CLOCK_REALTIME)

    def _state_after_incoming(self) -> RunState:
        if self._incoming is None:
            raise RunStateError("resume a guest that has not arrived", self._run_state, frozenset())
        target = self._incoming.run_state or RunState.RUNNING
        if target is RunState.INTERNAL_ERROR:
            self.error = "the guest was broken before it migrated here"
        return RunState.PAUSED if target is RunState.RUNNING and not self._start_after_incoming else target

    def leave_in_doubt(self) -> None:
        """Nobody can say whether the guest runs elsewhere, or one that came cannot be started: it stays stopped here, until its
        user says otherwise.
        """
        with self._lock:
            require("leave the migration", self._run_state, RunState.FINISH_MIGRATE, RunState.INMIGRATE)
            came = self._run_state is RunState.INMIGRATE
            before = self._state_after_incoming() if came else self._before_migration
            self._run_state = transition(
                self._run_state, RunState.PAUSED if before is RunState.RUNNING else before
            )
            self._collector.release()

    def migrated_away(self) -> None:
        """All of the guest is elsewhere; whether it may run here again, `ownership` says."""
        with self._lock:
            if self.ownership.may_run:
                raise RunStateError("leave a guest that is here", self._run_state, frozenset())
            self._run_state = transition(self._run_state, RunState.POSTMIGRATE)
            self._collector.release()

    def save_devices(self) -> list[DeviceState]:
        """The sections of CPUs and devices.

        :raise RunStateError: When the guest is not stopped for a migration.
        """
        with self._lock:
            require("save the devices", self._run_state, RunState.FINISH_MIGRATE)
            assert self._stopped_counter is not None
            return sections.save(self.devices, Stopped(self._stopped_counter, self._before_migration))

    def judge_section(self, state: DeviceState) -> Judgement:
        """Whether the guest can do without a device of the source's."""
        return absent.judge_section(state)

    def judge_ram_block(self, name: str, size: int) -> RamUse | None:
        """What the guest sees of a RAM block of the source's that is not here; None when it cannot do without it."""
        return absent.judge_ram_block(name, size)

    def load_devices(self, states: Sequence[DeviceState], ignored: Collection[str] = ()) -> None:
        """Take over CPUs and devices: all, or on an error none.

        :param ignored: names of sections of which what has no place here does not matter
        :raise StreamError: When a section is missing, unknown, or does not fit this machine.
        :raise RunStateError: When the machine does not wait for a guest.
        """
        with self._lock, self._collector.until_error():
            require("load the devices", self._run_state, RunState.INMIGRATE)
            stopped = Stopped(ignored=ignored)
            sections.load(states, self.devices, stopped, self.config.board.name, self.config.smp)()
            self._stopped_counter = stopped.counter
            self._incoming = stopped

    def announce(self, delays: Sequence[float]) -> None:
        """Tell the guest's networks that it is here, from when it runs."""
        for device in self.devices:
            device.announce(delays)

    def advance_counter(self, elapsed_ns: int) -> None:
        """The guest ran until `elapsed_ns` ago: let its counter jump by that. A guest that was paused lost no time."""
        with self._lock:
            require("advance the counter", self._run_state, RunState.INMIGRATE)
            if self._incoming is None or self._incoming.run_state not in (None, RunState.RUNNING):
                return
            assert self._stopped_counter is not None
            self._stopped_counter += ns_to_counter(max(elapsed_ns, 0), self._vm.counter_hz)
