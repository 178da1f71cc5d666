"""How a measurement fails."""


class BenchError(Exception):
    """It cannot be made; one line."""
