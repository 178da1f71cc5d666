"""A TLB flush for stage 2 without a CPU."""

from collections.abc import Callable

from sterna.stage2.tlb import FlushCounters


class RecordingFlush:
    """A flush that says what it saw.

    :param on_flush: runs at each, before the caller goes on
    """

    def __init__(self, on_flush: Callable[[], object] = lambda: None) -> None:
        self.counters = FlushCounters()
        self.on_flush = on_flush

    def flush_remote_tlbs(self) -> None:
        self.counters.flushes += 1
        self.on_flush()
