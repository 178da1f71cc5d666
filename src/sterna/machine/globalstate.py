"""Section `globalstate`: the run state that the source was in when it stopped for the migration."""

from collections.abc import Mapping, Sequence

from sterna.machine.devices.device import Apply, Device, SectionKey, Stopped, by_name, nothing
from sterna.machine.runstate import AFTER_INCOMING
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
        if stopped.run_state is None:
            return []
        text = stopped.run_state.value.encode()
        fields = {"size": len(text) + 1, "runstate": text.ljust(_TEXT_BYTES, b"\0")}
        return [DeviceState(GLOBAL_STATE.name, 0, GLOBAL_STATE.version, fields)]

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """The run state, for `stopped`: one that a destination can take over."""
        state = found.get((GLOBAL_STATE.name, 0))
        if state is not None:
            text = state.fields["runstate"].split(b"\0")[0].decode("ascii", "backslashreplace")
            known = {known.value: known for known in AFTER_INCOMING}
            if text not in known:
                names = ", ".join(sorted(known))
                raise StreamError(f"{text!r} is not one of the states {names}", state.name).inside("runstate")
            stopped.run_state = known[text]
        return nothing
