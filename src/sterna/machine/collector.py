"""Keeping Python's cyclic garbage collector out of a migration's downtime.

A full collection takes 50 to 100 ms once the compilers are loaded, and the few thousand objects that a machine's state consists
of are enough to start one.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CollectorHold:
    """One machine's wish that no collection starts. Collections go on when no machine has it."""

    _lock = threading.Lock()
    _holders = 0
    _was_enabled = False

    def __init__(self) -> None:
        self._held = False

    def take(self) -> None:
        """No collection from now on. Does nothing when it is taken already."""
        with self._lock:
            if not self._held:
                self._held = True
                if CollectorHold._holders == 0:
                    CollectorHold._was_enabled = gc.isenabled()
                    gc.disable()
                CollectorHold._holders += 1

    @contextmanager
    def until_error(self) -> Iterator[None]:
        """Take it, and keep it unless the body fails."""
        self.take()
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Collections may start again, for all that this machine cares. Does nothing when it is not taken."""
        with self._lock:
            if self._held:
                self._held = False
                CollectorHold._holders -= 1
                if CollectorHold._holders == 0 and CollectorHold._was_enabled:
                    gc.enable()
