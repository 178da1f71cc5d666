"""Section `globalstate`: the run state that the source was in when it stopped for the migration."""

from sterna.machine.runstate import AFTER_INCOMING, RunState
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription, buffer, u32

_TEXT_BYTES = 100

GLOBAL_STATE = VmStateDescription(
    "globalstate", version=1, fields=(u32("size"), buffer("runstate", _TEXT_BYTES))
)


def save_run_state(run_state: RunState) -> DeviceState:
    """The section of a machine that was in this state."""
    text = run_state.value.encode()
    fields = {"size": len(text) + 1, "runstate": text.ljust(_TEXT_BYTES, b"\0")}
    return DeviceState(GLOBAL_STATE.name, 0, GLOBAL_STATE.version, fields)


def load_run_state(state: DeviceState) -> RunState:
    """The state that the source was in.

    :raise StreamError: When it is not a run state that a destination can take over.
    """
    text = state.fields["runstate"].split(b"\0")[0].decode("ascii", "backslashreplace")
    try:
        run_state = RunState(text)
    except ValueError:
        run_state = None
    if run_state not in AFTER_INCOMING:
        known = ", ".join(sorted(known.value for known in AFTER_INCOMING))
        raise StreamError(f"{text!r} is not one of the states {known}", state.name).inside("runstate")
    assert run_state is not None
    return run_state
