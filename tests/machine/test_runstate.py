"""Run states and the transitions between them."""

import pytest

from sterna.machine.runstate import TRANSITIONS, RunState, RunStateError, require, transition


def test_names_are_qemus():
    assert {state.value for state in RunState} == {
        *("debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch"),
        *("finish-migrate", "restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog"),
        *("guest-panicked", "colo"),
    }


def test_every_pair_is_allowed_or_raises_with_both_states():
    for actual in RunState:
        for target in RunState:
            if target in TRANSITIONS.get(actual, ()):
                assert transition(actual, target) is target
                continue
            with pytest.raises(RunStateError) as caught:
                transition(actual, target)
            assert caught.value.actual is actual
            assert actual not in caught.value.required
            assert actual.value in str(caught.value)


def test_require_names_what_it_needs():
    require("stop", RunState.RUNNING, RunState.RUNNING, RunState.PAUSED)
    with pytest.raises(
        RunStateError, match="cannot stop: the machine is in state shutdown, this needs paused or running"
    ):
        require("stop", RunState.SHUTDOWN, RunState.RUNNING, RunState.PAUSED)
