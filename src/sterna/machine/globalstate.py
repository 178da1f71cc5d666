"""Section `globalstate`: the run state that the source was in when it stopped for the migration."""

from collections.abc import Mapping, Sequence

from sterna.machine.devices.device import Apply, Device, SectionKey, Stopped, by_name, nothing
from sterna.machine.runstate import AFTER_INCOMING, RunState
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription, buffer, u32

_TEXT_BYTES = 100

GLOBAL_STATE = VmStateDescription(
    "globalstate", version=1, fields=(u32("size"), buffer("runstate", _TEXT_BYTES))
)


class GlobalState(Device):
    """The run state as a device of the stream. A source may not say it."""

    descriptions = by_name(GLOBAL_STATE)
    optional = True

    def save(self, stopped: Stopped) -> Sequence[DeviceState]:
        """The run state's section, if there is one to be told."""
        return [] if stopped.run_state is None else [save_run_state(stopped.run_state)]

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """The run state, for `stopped`."""
        state = found.get((GLOBAL_STATE.name, 0))
        stopped.run_state = None if state is None else load_run_state(state)
        return nothing


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
