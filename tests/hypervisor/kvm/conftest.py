import os
import platform

import pytest

from sterna.hypervisor.interface import DirtyLogMode
from sterna.testing.conformance.backends import KvmX86
from sterna.testing.conformance.guest import ConformanceGuest


@pytest.fixture
def x86():
    """The x86_64 back end, where it can be had."""
    backend = KvmX86()
    if why := backend.missing():
        pytest.skip(why)
    return backend


@pytest.fixture
def make_guest(x86):
    guests = []

    def make(mode=DirtyLogMode.BITMAP, **arguments):
        guests.append(ConformanceGuest(x86, mode, **arguments))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.fixture
def kvm():
    """Skips where there is no KVM."""
    if platform.machine() not in ("x86_64", "aarch64") or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is missing or not ours to open")
