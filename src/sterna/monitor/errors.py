"""The root of what monitors and their clients raise."""

from sterna.errors import Error


class MonitorError(Error):
    """A command failed, or whoever is at the other end does not speak QMP; one line."""
