"""The tests of KVM on arm64, where they can run: inside the emulated host."""

import pytest

pytestmark = [pytest.mark.arm64host, pytest.mark.qemu, pytest.mark.slow]

PYTEST = "python3 -m pytest -q -x -p no:cacheprovider -p no:hypothesispytest"
SUITE = "tests/hypervisor/conformance"
FEW = "exactly or test_oracle and not with and not memory or slot_deleted or c126d94f"
"""Tests of the suite: one boot has time for the kernel's oracle, and some cases."""


def test_guests_of_both_kinds(in_arm64_host) -> None:
    command = f"python3 -m sterna doctor && {PYTEST} tests/hypervisor/kvm/arm64/test_vcpu.py"
    code, output = in_arm64_host(
        "sh", "-c", f"{command} && {PYTEST} {SUITE} -k '(kvm-armv7 or kvm-arm64) and ({FEW})'"
    )
    print(output)
    assert code == 0, output[-4000:]
    assert "guests can run and migrate here, on KVM only" in output
    assert "passed" in output
    assert "skipped" not in output, output[-4000:]


def test_where_kvm_is_in_the_kernel(in_arm64_host) -> None:
    """VHE: the host's kernel runs at EL2, as KVM does."""
    code, output = in_arm64_host(
        "sh",
        "-c",
        f"dmesg | grep -q 'VHE mode initialized' && {PYTEST} {SUITE} -k 'kvm-arm64 and (exactly or be097997)'",
        cpu="max",
    )
    print(output)
    assert code == 0, output[-4000:]
    assert "passed" in output
    assert "skipped" not in output, output[-4000:]
