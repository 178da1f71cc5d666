"""Locks on files and directories (flock(2)): one process at a time has one, until it closes the file or ends."""

import fcntl
import time
from collections.abc import Callable

_POLL_SECONDS = 0.1


def lock(
    file: int, *, waiting: Callable[[], None] = lambda: None, check: Callable[[], None] = lambda: None
) -> None:
    """Take the lock, when nobody else has it any more.

    :param file: an open descriptor
    :param waiting: called once, when another process has it
    :param check: called now and then as long as that is so; what it raises ends the wait
    """
    if try_lock(file):
        return
    waiting()
    # Not in the kernel, where nothing would be checked.
    while not try_lock(file):
        check()
        time.sleep(_POLL_SECONDS)


def try_lock(file: int) -> bool:
    """Take the lock unless another process has it: whether it was taken."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
