"""A guest made of real memory and a thread that dirties it: a second implementation of the `Guest` protocol.

Step i of the guest writes i + 1 into one word of page (i * STRIDE) % pages. So RAM follows from the number of
steps, which is in the device state, and the guest itself can tell whether a write was lost.
"""

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from sterna.host.closing import Closing
from sterna.hypervisor.traits import Trait
from sterna.memory.bitmap import DirtyBatch, full_bitmap, new_bitmap
from sterna.memory.ram import RamBlock
from sterna.ownership import Ownership, OwnershipState
from sterna.stream.unmatched import Judgement, RamUse
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription, array, u8, u32, u64

CPU = VmStateDescription("cpu", 1, (u64("steps"), u64("counter"), u32("running")))
DISK = VmStateDescription("disk", 3, (array(u8("cache"), 24),))
STRIDE = 7
WORDS_PER_PAGE = 512


class DoubleGuest(Closing):
    """
    :param steps_per_harvest: steps that the running guest makes at each harvest of its dirty log, besides those of its thread,
        and fewer when it is throttled: pages are dirty after every pass, however short the pass was and whatever else the machine
        did meanwhile
    """

    machine_type = "double-1.0"
    page_bits: int | None = 12
    uuid: bytes | None = None

    def __init__(
        self, pages: int = 64, *, running: bool = True, steps_per_ms: int = 20, steps_per_harvest: int = 0
    ) -> None:
        self.block = RamBlock("double.ram", pages * 4096)
        self.ram_blocks: Sequence[RamBlock] = (self.block,)
        self.descriptions = {"cpu": CPU, "disk": DISK}
        self.ownership = Ownership(OwnershipState.OWNER if running else OwnershipState.ABSENT)
        self.steps = 0
        self.counter = 0
        self.advanced_ns: int | None = None
        self.running = False
        self.away = False
        self.left_in_doubt = False
        self.logging = False
        self.logging_started = 0
        self.lose_write_at: int | None = None
        self.fail: dict[str, Exception] = {}
        self.cache = bytes(range(24))
        self.traits: list[Trait] = []
        self.host: dict[str, int] = {}
        self._was_running = running
        self._steps_per_ms = self._full_speed = steps_per_ms
        self._steps_per_harvest = self._full_steps = steps_per_harvest
        self.throttled: list[int] = []
        self._log = new_bitmap(pages)
        self._lock = threading.Condition()
        self._ended = False
        self._words = self.block.data.view(np.uint64)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if running:
            self.resume()

    # -- the guest -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._lock:
            while not self._ended:
                if not self.running:
                    self._lock.wait()
                    continue
                for _ in range(self._steps_per_ms):
                    self._step()
                self._lock.notify_all()
                self._lock.wait(0.001)

    def _step(self) -> None:
        page = self.steps * STRIDE % self.block.pages
        if self.logging and self.lose_write_at != page:
            self._log[page >> 6] |= np.uint64(1) << np.uint64(page & 63)
        self._words[page * WORDS_PER_PAGE + page % WORDS_PER_PAGE] = self.steps + 1
        self.steps += 1

    def step_until(self, steps: int) -> None:
        """Wait until the running guest has made so many steps."""
        with self._lock:
            assert self._lock.wait_for(lambda: self.steps >= steps or not self.running, 300)

    def advance_steps(self, count: int) -> None:
        """Make steps on the caller's thread."""
        with self._lock:
            for _ in range(count):
                self._step()

    def check_ram(self) -> None:
        """RAM is exactly what so many steps leave behind."""
        with self._lock:
            expected = np.zeros(self.block.size // 8, dtype=np.uint64)
            first = max(0, self.steps - self.block.pages * STRIDE)
            for step in range(first, self.steps):
                page = step * STRIDE % self.block.pages
                expected[page * WORDS_PER_PAGE + page % WORDS_PER_PAGE] = step + 1
            different = np.flatnonzero(self._words != expected) // WORDS_PER_PAGE
            assert not different.size, f"pages {different[:8]} differ after {self.steps} steps"

    def close(self) -> None:
        with self._lock:
            self._ended = True
            self.running = False
            self._lock.notify_all()
        self._thread.join()
        del self._words
        self.block.close()

    # -- the protocol ----------------------------------------------------------------------------------------

    def _may_fail(self, call: str) -> None:
        if call in self.fail:
            raise self.fail[call]

    def check_migratable(self) -> None:
        self._may_fail("check_migratable")

    def guest_traits(self) -> Sequence[Trait]:
        return self.traits

    def host_traits(self) -> Mapping[str, int]:
        return self.host

    def start_dirty_logging(self) -> None:
        self._may_fail("start_dirty_logging")
        with self._lock:
            assert not self.logging
            self.logging = True
            self.logging_started += 1
            self._log = new_bitmap(self.block.pages)

    def stop_dirty_logging(self) -> None:
        with self._lock:
            self.logging = False

    def harvest(self) -> list[DirtyBatch]:
        self._may_fail("harvest")
        with self._lock:
            assert self.logging
            for _ in range(self._steps_per_harvest if self.running else 0):
                self._step()
            words, self._log = self._log, new_bitmap(self.block.pages)
        assert not (words & ~full_bitmap(self.block.pages)).any()
        return [DirtyBatch(self.block.name, words)]

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            yield

    def peek_dirty_log(self) -> list[DirtyBatch]:
        return [DirtyBatch(self.block.name, self._log.copy())]

    def positions(self) -> Sequence[int]:
        return [self.steps]

    def locate(self, block: str, page: int) -> tuple[int, int]:
        return 3, 0x4000_0000 + page * 4096

    def throttle(self, percent: int) -> None:
        with self._lock:
            self._steps_per_ms = max(1, self._full_speed * (100 - percent) // 100)
            self._steps_per_harvest = self._full_steps * (100 - percent) // 100
            self.throttled.append(percent)

    def stop_for_migration(self) -> int:
        with self._lock:
            self._was_running = self.running
            self.running = False
            self._may_fail("stop_for_migration")
            return time.time_ns()

    def resume(self) -> int:
        self._may_fail("resume")
        with self._lock:
            self.ownership.require_owner()
            self.running = self._was_running
            self._lock.notify_all()
            return time.time_ns()

    def leave_in_doubt(self) -> None:
        with self._lock:
            assert not self.running
            self.left_in_doubt = True

    def migrated_away(self) -> None:
        with self._lock:
            assert not self.running
            self.away = True

    def save_devices(self) -> list[DeviceState]:
        self._may_fail("save_devices")
        with self._lock:
            assert not self.running
            cpu = {"steps": self.steps, "counter": self.counter, "running": int(self._was_running)}
            return [
                DeviceState("cpu", 0, 1, cpu),
                DeviceState("disk", 0, 3, {"cache": list(self.cache)}),
            ]

    def judge_section(self, state: DeviceState) -> Judgement:
        """Field `harmless` of a section says whether it is."""
        harmless = state.fields.get("harmless") == 1
        return Judgement(harmless, "it says so" if harmless else "field 'harmless' is not 1")

    def judge_ram_block(self, name: str, size: int) -> RamUse | None:
        return {"double.flash": RamUse.BLANK, "double.rom": RamUse.UNSEEN}.get(name)

    def load_devices(self, states: Sequence[DeviceState], ignored: Collection[str] = ()) -> None:
        self._may_fail("load_devices")
        found = {state.name: state for state in states}
        for name in self.descriptions:
            if name not in found:
                raise StreamError("the section is missing", name)
        if found["cpu"].fields["running"] not in (0, 1):
            raise StreamError("running is neither 0 nor 1", "cpu")
        with self._lock:
            assert not self.running
            self.steps = found["cpu"].fields["steps"]
            self.counter = found["cpu"].fields["counter"]
            self.cache = bytes(found["disk"].fields["cache"])
            self._was_running = bool(found["cpu"].fields["running"])

    def announce(self, delays: Sequence[float]) -> None:
        self.announced = list(delays)

    def advance_counter(self, elapsed_ns: int) -> None:
        with self._lock:
            assert not self.running
            self.advanced_ns = elapsed_ns
            self.counter += elapsed_ns
