"""The root of what this computer refuses."""

from sterna.errors import Error


class HostError(Error):
    """A file, an address or a name that this computer does not have, or not as it should be; the text says what is wrong."""
