"""How building an image fails."""

from sterna.testbed.errors import BedError


class ImageError(BedError):
    """An image cannot be built; the text says what is missing or what went wrong, and what to do."""
