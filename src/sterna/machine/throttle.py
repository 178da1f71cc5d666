"""Slowing a guest down: its vCPUs stand still for a share of their time.

As QEMU's cpu-throttle does it: they run for a time slice of 10 ms and stand still for as long as the percentage makes of it.
"""

import threading
from typing import Protocol

_SLICE_S = 0.01


class Holdable(Protocol):
    """vCPUs, as a throttle sees them."""

    def hold(self) -> None:
        """Keep them from running until `release`."""
        ...

    def release(self) -> None:
        """End a `hold`."""
        ...


class Throttle:
    """The throttle of one machine's vCPUs.

    :param changed: what it spends its time slices waiting on; by its timeouts goes the share that the vCPUs are held
    """

    def __init__(self, threads: Holdable, changed: threading.Condition | None = None) -> None:
        self._threads = threads
        self._changed = changed or threading.Condition()
        self._percent = 0
        self._thread: threading.Thread | None = None

    def set(self, percent: int) -> None:
        """Let the vCPUs stand still for 0 to 99 percent of their time; when this returns with 0 they run freely.

        :raise RuntimeError: When the host has no thread to spare.
        """
        assert 0 <= percent < 100
        with self._changed:
            self._percent = percent
            self._changed.notify_all()
            thread = self._thread
            if percent and thread is None:
                started = threading.Thread(target=self._run, name="throttle", daemon=True)
                started.start()
                self._thread = started
        if not percent and thread is not None:
            thread.join()

    def _run(self) -> None:
        with self._changed:
            while self._percent:
                self._changed.wait(_SLICE_S)
                if not self._percent:
                    break
                self._threads.hold()
                self._changed.wait(_SLICE_S * self._percent / (100 - self._percent))
                self._threads.release()
            self._thread = None
