"""How building or running the host fails."""

from sterna.testbed.debian.errors import ImageError


class ArmHostError(ImageError):
    """The host cannot be built or did not run; the text says what is missing or what went wrong, and what to do."""
