"""sterna on the emulated CPU."""

from functools import partial

from sterna.testbed.sternakind import SternaKind

KIND = partial(SternaKind, "emulated")
