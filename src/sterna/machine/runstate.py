"""Run states of a machine, and which may follow which.

            cont                stop_for_migration             migrated_away
  prelaunch ----> running <==========> finish-migrate -----------------------> postmigrate
                  |  ^ |                 ^      | resume after a failed migration: back to the state before
             stop |  | | guest fails     |      v
                  v  | +-----------> paused, prelaunch, shutdown, internal-error
                paused

An incoming machine starts as `inmigrate`; `resume` takes it to the state that its source was in. From `postmigrate`, and from
`paused` after a migration in doubt, `cont` runs the guest where `sterna.ownership` lets it.
"""

from enum import Enum

from sterna.machine.errors import MachineError


class RunState(Enum):
    """States of a machine, named as in QEMU 7.2's `RunState` of qapi/run-state.json."""

    DEBUG = "debug"
    INMIGRATE = "inmigrate"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    PRELAUNCH = "prelaunch"
    FINISH_MIGRATE = "finish-migrate"
    RESTORE_VM = "restore-vm"
    RUNNING = "running"
    SAVE_VM = "save-vm"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = "guest-panicked"
    COLO = "colo"


_S = RunState

TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    _S.PRELAUNCH: frozenset({_S.INMIGRATE, _S.RUNNING, _S.FINISH_MIGRATE, _S.POSTMIGRATE, _S.SHUTDOWN}),
    _S.INMIGRATE: frozenset({_S.RUNNING, _S.PAUSED, _S.PRELAUNCH, _S.SHUTDOWN, _S.INTERNAL_ERROR}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.FINISH_MIGRATE, _S.SHUTDOWN, _S.INTERNAL_ERROR}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.FINISH_MIGRATE, _S.POSTMIGRATE, _S.SHUTDOWN}),
    _S.FINISH_MIGRATE: frozenset(
        {_S.RUNNING, _S.PAUSED, _S.PRELAUNCH, _S.SHUTDOWN, _S.INTERNAL_ERROR, _S.POSTMIGRATE}
    ),
    _S.SHUTDOWN: frozenset({_S.FINISH_MIGRATE, _S.POSTMIGRATE}),
    _S.INTERNAL_ERROR: frozenset({_S.FINISH_MIGRATE, _S.POSTMIGRATE, _S.SHUTDOWN}),
    _S.POSTMIGRATE: frozenset({_S.RUNNING, _S.SHUTDOWN}),
}
"""Which states may follow a state; states that are not a key are never entered."""

AFTER_INCOMING = frozenset({_S.RUNNING, _S.PAUSED, _S.PRELAUNCH, _S.SHUTDOWN, _S.INTERNAL_ERROR})
"""States of the source that a destination can take over."""


MIGRATABLE = frozenset(state for state, targets in TRANSITIONS.items() if _S.FINISH_MIGRATE in targets)
"""States of a machine that has a guest to migrate."""


class RunStateError(MachineError):
    """The machine is in a state that does not allow what was asked.

    :ivar actual: the state it is in
    :ivar required: the states that would allow it
    """

    def __init__(self, action: str, actual: RunState, required: frozenset[RunState]) -> None:
        self.actual = actual
        self.required = required
        wanted = " or ".join(sorted(state.value for state in required)) or "another one"
        super().__init__(f"cannot {action}: the machine is in state {actual.value}, this needs {wanted}")


def require(action: str, actual: RunState, *required: RunState) -> None:
    """Check that the machine is in one of the states `required`.

    :raise RunStateError: When it is not.
    """
    if actual not in required:
        raise RunStateError(action, actual, frozenset(required))


def transition(actual: RunState, target: RunState) -> RunState:
    """`target`, if it may follow `actual`.

    :raise RunStateError: When it may not.
    """
    if target not in TRANSITIONS.get(actual, frozenset()):
        sources = frozenset(state for state, targets in TRANSITIONS.items() if target in targets)
        raise RunStateError(f"go to state {target.value}", actual, sources)
    return target
