"""Guest programs: bare-metal ARMv7 images that ship with the package, and how to read what they do.

- `catalog`: the programs, their arguments, where the images are
- `layout`: the status page that every program keeps
- `check`: whether the content of a guest's RAM is what the program must have written
- `build`: ``python -m sterna.guests.build`` makes the images from the sources in ``src/``
"""

from sterna.guests.catalog import BOARDS, PROGRAMS, GuestError, Program, find, validate

__all__ = ["BOARDS", "PROGRAMS", "GuestError", "Program", "find", "validate"]
