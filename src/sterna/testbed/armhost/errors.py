"""How building or running the host fails."""


class ArmHostError(Exception):
    """The host cannot be built or did not run; the text says what is missing or what went wrong, and what to do."""
