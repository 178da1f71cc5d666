"""The root of what a machine refuses."""

from sterna.errors import Error


class MachineError(Error):
    """A machine cannot be made, or cannot do what it was told; the text says what and why."""
