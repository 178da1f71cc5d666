"""Guests of the kernel's KVM, as tests of what all architectures share have them."""

from tests.hypervisor.kvm.conftest import make_guest, x86

__all__ = ["make_guest", "x86"]
