"""Waiting for VM processes and their guests; migrations, watched from outside by `query-migrate`."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from sterna.guests.layout import Status
from sterna.host.load import HostWatch
from sterna.launch.errors import WaitedTooLong
from sterna.launch.guestview import warm_status
from sterna.launch.process import Vm

FINAL = frozenset({"completed", "failed", "cancelled"})
"""Statuses of query-migrate that do not change any more."""
_POLL_SECONDS = 0.05
Info = Mapping[str, Any]


def wait_for(
    condition: Callable[[], bool],
    seconds: float,
    otherwise: str,
    host: HostWatch,
    *,
    check: Callable[[], None] = lambda: None,
    poll_seconds: float = _POLL_SECONDS,
) -> None:
    """Ask until the condition holds.

    :param otherwise: what is wrong when it does not in so many seconds
    :param host: says then how busy the host was
    :param check: called in between; may raise
    :raise WaitedTooLong: When it does not hold in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        check()
        if time.monotonic() > deadline:
            raise WaitedTooLong(f"{otherwise} in {seconds:g} s; {host.load()}")
        time.sleep(poll_seconds)


def wait_warm(
    vm: Vm, address: int, seconds: float, host: HostWatch, check: Callable[[], None] = lambda: None
) -> Status:
    """Wait until a guest program works at its steady pace; parameters as of `wait_for`.

    :param address: of its status page
    :return: that page
    :raise VmError: When it never will.
    :raise WaitedTooLong: When it does not in time.
    """
    found: list[Status] = []

    def warm() -> bool:
        status = warm_status(vm, address)
        found[:] = [] if status is None else [status]
        return bool(found)

    problem = f"the guest of the {vm.name} did not touch all its memory"
    wait_for(warm, seconds, problem, host, check=check)
    return found[0]


def watch(query: Callable[[], Info], look: Callable[[Info], None], pause: Callable[[], object]) -> Info:
    """Follow a migration to its outcome.

    :param query: asks query-migrate
    :param look: called with each answer that is no outcome
    :param pause: called after that
    :return: the outcome
    """
    while (info := query()).get("status") not in FINAL:
        look(info)
        pause()
    return info
