"""sterna on KVM."""

from functools import partial

from sterna.testbed.sternakind import SternaKind

KIND = partial(SternaKind, "kvm")
