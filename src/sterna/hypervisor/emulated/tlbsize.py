"""The size of the emulated CPUs' TLBs.

QEMU's software TLB, which Unicorn inherits, starts with 256 entries and doubles when a flush finds it more than 70 % used.
A guest that nobody flushes would keep the small one, and walk the tables on most accesses to a large working set. So each
VM's TLBs are flushed a few times while its guests warm up: afterwards a guest behind stage 2 is as fast as one without
(bench/stage2.py).
"""

import contextlib
import threading
from collections.abc import Callable

_ROUNDS = 16
"""Doublings from 256 entries to more than a 32-bit guest has pages, and a few to spare for rounds that find it idle."""
_INTERVAL_S = 0.1


class TlbSizing:
    """Flushes a VM's TLBs while its guests warm up.

    :param flush: the broadcast; called from a thread of its own
    """

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """A vCPU begins to run. Only the first call counts; where the host has no thread to spare the next tries again, and the
        guest is only slower meanwhile.
        """
        with self._lock:
            if self._thread is None and not self._ended.is_set():
                thread = threading.Thread(target=self._run, name="tlb-sizing", daemon=True)
                with contextlib.suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    @property
    def active(self) -> bool:
        """Whether the guests are warming up, and flushed for it."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        for _ in range(_ROUNDS):
            if self._ended.wait(_INTERVAL_S):
                return
            self._flush()

    def end(self) -> None:
        """No more flushes after this returns."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
