"""Waiting, and following a migration to its outcome."""

import pytest

from sterna.host.load import HostWatch
from sterna.launch.errors import WaitedTooLong
from sterna.launch.watch import FINAL, Info, wait_for, watch


def test_a_wait_that_fails_says_how_busy_the_host_was() -> None:
    with pytest.raises(WaitedTooLong, match=r"^it did not in 0 s; host meanwhile: \d+ CPUs?, load \d"):
        wait_for(lambda: False, 0.0, "it did not", HostWatch())


def test_a_wait_ends_with_what_its_check_raises() -> None:
    def check() -> None:
        raise KeyboardInterrupt

    wait_for(lambda: True, 0.0, "it did not", HostWatch(), check=check)
    with pytest.raises(KeyboardInterrupt):
        wait_for(lambda: False, 1e9, "it did not", HostWatch(), check=check)


@pytest.mark.parametrize("final", sorted(FINAL))
def test_a_migration_is_followed_to_its_outcome(final: str) -> None:
    answers: list[Info] = [{}, {"status": "setup"}, {"status": "active", "ram": {}}, {"status": final}]
    ahead, seen, pauses = iter(answers), list[Info](), list[int]()
    outcome = watch(lambda: next(ahead), seen.append, lambda: pauses.append(len(seen)))
    assert outcome is answers[-1]
    assert seen == answers[:-1]
    assert pauses == [1, 2, 3]
