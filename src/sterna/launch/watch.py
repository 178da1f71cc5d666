"""Waiting for VM processes and their guests; migrations, watched from outside by `query-migrate`."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sterna.guests.layout import Status
from sterna.host.load import HostWatch
from sterna.launch.errors import WaitedTooLong
from sterna.launch.guestview import warm_status
from sterna.launch.process import VmProcess

FINAL = frozenset({"completed", "failed", "cancelled"})
"""Statuses of query-migrate that do not change any more."""
_POLL_SECONDS = 0.05
Info = Mapping[str, Any]
T = TypeVar("T")


def wait_for(
    ask: Callable[[], T | None],
    seconds: float,
    otherwise: str,
    host: HostWatch,
    *,
    check: Callable[[], None] = lambda: None,
    poll_seconds: float = _POLL_SECONDS,
) -> T:
    """Ask until there is an answer other than None and False.

    :param otherwise: what is wrong when there is none in so many seconds
    :param host: says then how busy the host was
    :param check: called in between; may raise
    :return: the answer
    :raise WaitedTooLong: When there is none in time.
    """
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        check()
        if time.monotonic() > deadline:
            raise WaitedTooLong(f"{otherwise} in {seconds:g} s; {host.load()}")
        time.sleep(poll_seconds)
    return answer


def wait_warm(
    vm: VmProcess, address: int, seconds: float, host: HostWatch, check: Callable[[], None] = lambda: None
) -> Status:
    """Wait until a guest program works at its steady pace; parameters as of `wait_for`.

    :param address: of its status page
    :return: that page
    :raise VmError: When it never will.
    :raise WaitedTooLong: When it does not in time.
    """
    problem = f"the guest of the {vm.name} did not touch all its memory"
    return wait_for(lambda: warm_status(vm, address), seconds, problem, host, check=check)


def watch(
    query: Callable[[], Info], on_progress: Callable[[Info], None], pause: Callable[[], object]
) -> Info:
    """Follow a migration to its outcome.

    :param query: asks query-migrate
    :param on_progress: called with each answer that is no outcome
    :param pause: called after that
    :return: the outcome
    """
    while (info := query()).get("status") not in FINAL:
        on_progress(info)
        pause()
    return info
