"""Locks that another process has."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sterna.host.filelock import lock, try_lock


class Enough(Exception):
    """Ends a wait."""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Two descriptors of a directory, as two processes have them; the first has the lock."""
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    fcntl.flock(first, fcntl.LOCK_EX)
    yield first, second
    os.close(first)
    os.close(second)


def test_waiting_is_told_once_and_looked_after(held: tuple[int, int]) -> None:
    told: list[str] = []

    def check() -> None:
        told.append("check")
        if len(told) == 3:
            fcntl.flock(held[0], fcntl.LOCK_UN)

    lock(held[1], waiting=lambda: told.append("waiting"), check=check)
    assert told == ["waiting", "check", "check"]
    assert not try_lock(held[0])


def test_a_check_ends_the_wait(held: tuple[int, int]) -> None:
    def check() -> None:
        raise Enough

    with pytest.raises(Enough):
        lock(held[1], check=check)


def test_nobody_waits_for_what_is_free(held: tuple[int, int]) -> None:
    fcntl.flock(held[0], fcntl.LOCK_UN)
    told: list[str] = []
    lock(held[1], waiting=lambda: told.append("waiting"))
    assert told == []
