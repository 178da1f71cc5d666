"""A machine: its hardware, whose its guest is, and the states it goes through."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from sterna.hypervisor.interface import Exit, ExitReason, SystemEvent
from sterna.machine.collector import CollectorHold
from sterna.machine.config import MachineConfig
from sterna.machine.devices.device import Stopped
from sterna.machine.hardware import Hardware
from sterna.machine.runstate import RunState, require, transition
from sterna.memory.ram import RamBlock
from sterna.ownership import Event, Ownership, OwnershipState

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


@dataclass
class MigrationState:
    """What a migration has made of a machine's run state, and what its user has said meanwhile. `MigratableMachine` keeps it.

    :ivar before: the state in which the guest was when it was stopped for a migration
    :ivar arrived: what came with a guest, or None while none has come
    :ivar start: a guest that comes runs as soon as it is there
    :ivar collector: kept off while the guest is down
    """

    before: RunState
    start: bool
    arrived: Stopped | None = None
    collector: CollectorHold = field(default_factory=CollectorHold)


class Machine:
    """A virtual machine. It comes up in state prelaunch, or inmigrate when it waits for a guest; `cont` starts it.

    The guest's counter stands still while the machine is paused. It does not while a migration is under way: if that
    fails, the guest goes on as if it had only been slow.

    :ivar config: its settings
    :ivar serial: the far end of the first UART
    :ivar ram_blocks: guest RAM
    :ivar hardware: what it consists of
    :ivar ownership: whether the guest is this machine's; every start of the vCPUs asks it
    :ivar error: what stopped the guest, when it was not told to stop: fault, address, pc in the first line, then registers
    :ivar lock: held while the run state changes
    :ivar migration: what a migration has made of the run state
    :ivar stopped_counter: the guest's counter while it stands still, in ticks; None while it runs

    :raise ConfigError: When the host cannot give the RAM, or not as whole pages of the dirty log.
    :raise LoadError: When the kernel cannot be loaded.
    :raise GuestError: When there is no such guest program or it cannot run so.
    :raise SerialError: When the serial line cannot be opened.
    :raise TapError: When a network card's tap cannot be opened.
    :raise Unsupported: When this host cannot have such a machine.
    :raise HypervisorError: When the hypervisor cannot make it for another reason.
    """

    def __init__(self, config: MachineConfig, prepare: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self.error: str | None = None
        self.ownership = Ownership(OwnershipState.ABSENT if config.incoming else OwnershipState.OWNER)
        self.lock = threading.RLock()
        self._listeners: list[Listener] = []
        self._run_state = RunState.INMIGRATE if config.incoming else RunState.PRELAUNCH
        self.migration = MigrationState(self._run_state, start=not config.paused)
        self.stopped_counter: int | None = 0
        self.hardware = Hardware(config, prepare, self._vcpu_left)
        self.serial = self.hardware.serial
        self.ram_blocks: Sequence[RamBlock] = (self.hardware.ram.block,)

    # -- run state and events ----------------------------------------------------------------------------------------------

    @property
    def run_state(self) -> RunState:
        """The state the machine is in."""
        return self._run_state

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Hand events to `listener`: STOP, RESUME, SHUTDOWN.

        :return: ends the subscription
        """
        with self.lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self.lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return unsubscribe

    def stop(self) -> None:
        """Pause the guest and its counter. Does nothing when it does not run."""
        with self.lock:
            match self._run_state:
                case RunState.RUNNING:
                    self.pause(RunState.PAUSED)
                case RunState.INMIGRATE:
                    self.migration.start = False
                case RunState.FINISH_MIGRATE if self.migration.before is RunState.RUNNING:
                    self.migration.before = RunState.PAUSED
                case _:
                    pass

    def cont(self, *, force: bool = False) -> None:
        """Run the guest; its counter goes on from where it stood. Does nothing when it runs.

        In state inmigrate the guest will run as soon as it is there, whatever the settings say.

        :param force: the caller answers for it that the guest runs nowhere else
        :raise RunStateError: When the guest has ended or is broken.
        :raise NotTheOwner: When it runs elsewhere, or may.
        """
        with self.lock:
            if self._run_state is RunState.INMIGRATE:
                self.migration.start = True
            elif self._run_state is not RunState.RUNNING:
                ended = self._run_state is RunState.POSTMIGRATE and self.migration.before in _ENDED
                state = self.migration.before if ended else self._run_state
                require("run the guest", state, RunState.PAUSED, RunState.PRELAUNCH, RunState.POSTMIGRATE)
                self.ownership.apply(Event.FORCED_CONT if force else Event.CONT)
                self.run()

    def shutdown(self) -> None:
        """End the guest: it never runs again. Does nothing when it has ended."""
        with self.lock:
            if self._run_state is RunState.RUNNING:
                self.pause(RunState.PAUSED)
            if self._run_state is not RunState.SHUTDOWN:
                self.enter(RunState.SHUTDOWN)
                self._emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})

    def close(self) -> None:
        """Stop the guest and free everything. Not to be called by a listener."""
        self.migration.collector.release()
        self.hardware.close()

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

    def _start_vcpus(self) -> int:
        """The one place from which vCPUs go on."""
        self.ownership.require_owner()
        return self.hardware.threads.resume()

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
        with self.lock:
            if self._run_state is RunState.RUNNING and self.hardware.threads.exited:
                self.pause(RunState.PAUSED)

    # -- for `MigratableMachine`, with the lock held -----------------------------------------------------------------------

    def enter(self, state: RunState) -> None:
        """Go to a state; nothing else changes."""
        self._run_state = transition(self._run_state, state)

    def run(self) -> int:
        """Go to state running. When it raises, nothing runs: the vCPUs' start is the last step.

        :return: CLOCK_REALTIME in ns just before the first guest instruction
        :raise NotTheOwner: When the guest is not this machine's.
        """
        self.ownership.require_owner()  # cards and events are the guest's too
        before, stopped_counter = self._run_state, self.stopped_counter
        self.enter(RunState.RUNNING)
        try:
            if stopped_counter is not None:
                self.hardware.vm.set_counter(stopped_counter)
                self.stopped_counter = None
            self._emit("RESUME")
            self.hardware.resume_devices()
            return self._start_vcpus()
        except BaseException:
            self.hardware.pause_devices()
            self._run_state, self.stopped_counter = before, stopped_counter
            raise

    def pause(self, target: RunState) -> int:
        """Leave state running for `target`, or, if a vCPU had just stopped by itself, for what that means.

        :return: CLOCK_REALTIME in ns when the last vCPU had stopped
        """
        stopped_at = self.hardware.threads.pause()
        self.hardware.pause_devices()
        self.stopped_counter = self.hardware.vm.counter()
        own = self.hardware.threads.take_exits()
        if own:
            target = self._account_for(*own[0])
        self.enter(target)
        self._emit("STOP")
        return stopped_at

    @contextmanager
    def held(self) -> Iterator[None]:
        """No vCPU runs, and the run state stays as it is. Takes the lock."""
        with self.lock:
            running = self._run_state is RunState.RUNNING
            if running:
                self.hardware.threads.pause()
            try:
                yield
            finally:
                if running:
                    self._start_vcpus()

    # -- inspection --------------------------------------------------------------------------------------------------------

    def cpus(self) -> list[CpuInfo]:
        """The vCPUs."""
        return [CpuInfo(index, thread_id) for index, thread_id in enumerate(self.hardware.threads.thread_ids)]

    def registers(self, cpu: int) -> str:
        """A vCPU's registers as text. A running guest stops for a moment.

        :raise ValueError: When there is no such vCPU.
        """
        if not 0 <= cpu < self.config.smp:
            raise ValueError(f"CPU {cpu}: the machine has CPUs 0 to {self.config.smp - 1}")
        with self.held():
            return self._dump(cpu)

    def read_physical(self, ipa: int, size: int) -> bytes:
        """Guest RAM at a physical address.

        :raise AddressError: When the range is not in RAM.
        """
        return self.hardware.ram.read(ipa, size)

    def statistics(self) -> dict[str, int]:
        """The hypervisor's counters by name."""
        return dict(self.hardware.vm.statistics())

    def network_counts(self) -> dict[str, dict[str, int]]:
        """Frames that each network card has carried, by its tap and by what became of them (`FrameCounts`)."""
        return {card.network.name: asdict(card.counts) for card in self.hardware.cards}

    def unmap(self, ipa: int, size: int) -> None:
        """Take the mappings of a range of RAM away, as a host that reclaims memory does. As `GuestRam.unmap`."""
        self.hardware.ram.unmap(ipa, size)

    def age(self, ipa: int, size: int) -> int:
        """How many mappings of a range the guest has used since this was asked last. As `GuestRam.age`."""
        return self.hardware.ram.age(ipa, size)

    def _dump(self, cpu: int) -> str:
        return self.hardware.platform.dump(cpu)
