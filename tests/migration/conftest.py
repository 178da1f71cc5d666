"""What the tests of migration share."""

import os
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test leaves a thread or a file descriptor behind."""
    threads = set(threading.enumerate())
    descriptors = set(os.listdir("/proc/self/fd"))
    yield
    for thread in threading.enumerate():
        if thread.name == "exec-exit":
            thread.join(30)  # a command that has sent its stream ends when it likes
    left = [thread.name for thread in threading.enumerate() if thread not in threads]
    assert not left, f"threads left: {left}"
    after = set(os.listdir("/proc/self/fd")) - descriptors
    names = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in after if os.path.islink(f"/proc/self/fd/{fd}")}
    assert not names, f"descriptors left: {names}"
