"""How a measurement fails."""

from sterna.errors import Error


class BenchError(Error):
    """It cannot be made; one line."""
