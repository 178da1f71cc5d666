"""How the test bed fails, beside the errors of launching (`sterna.launch.errors`).

::

    LaunchError
      +-- BedError            the bed cannot do it; one line for the user
            +-- ScenarioError a scenario file is wrong: the user's
            +-- ImageError    an image, or the host that is made of one
"""

from sterna.launch.errors import LaunchError


class BedError(LaunchError):
    """The test bed cannot do what is asked; one line."""


class ScenarioError(BedError):
    """A scenario file is wrong; the text names file, key and what was expected."""


class ImageError(BedError):
    """An image cannot be built, or the host in it does not run; the text says what is missing or what went wrong, and what to
    do.
    """
