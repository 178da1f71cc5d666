"""The tests of KVM on arm64, where they can run: inside the emulated host."""

import pytest

pytestmark = [pytest.mark.arm64host, pytest.mark.qemu, pytest.mark.slow]

PYTEST = ("python3", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")


def test_armv7_guests(in_arm64_host) -> None:
    code, output = in_arm64_host(*PYTEST, "tests/hypervisor/kvm/arm64/test_vcpu.py")
    print(output)
    assert code == 0, output[-4000:]
    assert "skipped" not in output, output[-4000:]
