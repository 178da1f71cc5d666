"""The threads that run a machine's vCPUs, all or none of them."""

import threading
import time
from collections.abc import Callable, Sequence

from sterna.hypervisor.interface import Exit, ExitReason, Vcpu

OnExit = Callable[[], None]
"""Called on a vCPU's thread, outside guest mode, when the vCPU stopped for a reason of its own, which `take_exits` tells."""


class CpuThreads:
    """One thread per vCPU. `pause` and `resume` are for one caller at a time."""

    def __init__(self, vcpus: Sequence[Vcpu], on_exit: OnExit) -> None:
        self._vcpus = tuple(vcpus)
        self._on_exit = on_exit
        self._changed = threading.Condition()
        self._go = False
        self._held = False
        self._quit = False
        self._inside = 0
        self._exits: list[tuple[int, Exit]] = []
        self._threads: list[threading.Thread] = []
        try:
            for vcpu in self._vcpus:
                thread = threading.Thread(
                    target=self._loop, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    @property
    def thread_ids(self) -> list[int]:
        """The host's thread ids, by vCPU."""
        return [thread.native_id or 0 for thread in self._threads]

    def resume(self) -> int:
        """Let all vCPUs run.

        :return: CLOCK_REALTIME in ns just before the first could
        """
        with self._changed:
            now = time.clock_gettime_ns(time.CLOCK_REALTIME)
            self._go = True
            self._changed.notify_all()
        return now

    def pause(self) -> int:
        """Stop all vCPUs. Returns when none is in guest mode any more.

        :return: CLOCK_REALTIME in ns when the last had left it
        """
        with self._changed:
            self._go = False
            for vcpu in self._vcpus:
                vcpu.kick()
            self._changed.wait_for(lambda: self._inside == 0)
            return time.clock_gettime_ns(time.CLOCK_REALTIME)

    def hold(self) -> None:
        """Keep the vCPUs from running until `release`, whatever `pause` and `resume` say; does not wait until they stand."""
        with self._changed:
            self._held = True
            for vcpu in self._vcpus:
                vcpu.kick()

    def release(self) -> None:
        """End a `hold`."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    @property
    def exited(self) -> bool:
        """Whether `take_exits` has something."""
        return bool(self._exits)

    def take_exits(self) -> list[tuple[int, Exit]]:
        """vCPUs that stopped by themselves since the last call, in that order: index and reason."""
        with self._changed:
            taken, self._exits = self._exits, []
        return taken

    def close(self) -> None:
        """Stop all vCPUs and end the threads. Not to be called from one of them."""
        with self._changed:
            self._quit = True
            self._changed.notify_all()
        self.pause()
        for thread in self._threads:
            thread.join()

    def _loop(self, vcpu: Vcpu) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: (self._go and not self._held) or self._quit)
                if self._quit:
                    return
                self._inside += 1
            leaving = self._run(vcpu)
            own = leaving.reason is not ExitReason.INTR
            with self._changed:
                if own:
                    self._exits.append((vcpu.index, leaving))
                self._inside -= 1
                self._changed.notify_all()
            if own:
                # The other vCPUs run on until the machine, told by this call, pauses them; this one stays out until then.
                self._on_exit()

    def _run(self, vcpu: Vcpu) -> Exit:
        """Run guest code until this vCPU is to pause, or stops by itself."""
        while True:
            try:
                leaving = vcpu.run()
            except Exception as error:  # a device's bug must stop the machine, not one thread of it
                return Exit(
                    ExitReason.INTERNAL_ERROR, detail=f"vCPU {vcpu.index}: {type(error).__name__}: {error}"
                )
            if leaving.reason is not ExitReason.INTR or not self._go or self._held:
                return leaving
