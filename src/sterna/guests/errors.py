"""What goes wrong with guest programs."""

from sterna.errors import Error


class GuestError(Error):
    """The user named a guest program, board or arguments that cannot be; the text says which and what would do."""
