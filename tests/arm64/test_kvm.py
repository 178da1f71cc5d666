"""The tests of KVM on arm64, where they can run: inside the emulated host."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from tests.arm64.conftest import Run

pytestmark = [pytest.mark.arm64host, pytest.mark.qemu, pytest.mark.slow]

PYTEST = "python3 -m pytest -q -x -rps -p no:cacheprovider -p no:hypothesispytest"
SUITE = "tests/hypervisor/conformance"
FEW = "exactly or test_oracle and not with and not memory or slot_deleted or c126d94f"
"""Tests of the suite: one boot has time for the kernel's oracle, and some cases."""
OTHERS = "tests/hypervisor/kvm/arm64/test_vcpu.py"

# One run of pytest each: to start it takes the emulated CPU longer than most tests.
COMMANDS = {
    "cortex-a57": f"python3 -m sterna doctor && {PYTEST} {OTHERS} {SUITE}"
    f" -k 'test_vcpu or (kvm-armv7 or kvm-arm64) and ({FEW})'",
    "max": f"dmesg | grep -q 'VHE mode initialized' && {PYTEST} {SUITE} -k 'kvm-arm64 and (exactly or be097997)'",
}
"""What runs in the host, by its CPU."""

Runs = dict[str, Future[tuple[int, str]]]


class _Over(Exception):
    """The tests are."""


@pytest.fixture(scope="module")
def runs(in_arm64_host: Run) -> Iterator[Runs]:
    """All hosts at once: each is busy on one of its CPUs most of the time."""
    over = threading.Event()

    def check() -> None:
        if over.is_set():
            raise _Over

    with ThreadPoolExecutor(len(COMMANDS)) as threads:
        yield {
            cpu: threads.submit(in_arm64_host, "sh", "-c", command, cpu=cpu, check=check)
            for cpu, command in COMMANDS.items()
        }
        over.set()


def passed(run: Future[tuple[int, str]]) -> str:
    """What a command wrote whose tests have all passed, and none was left out."""
    code, output = run.result()
    print(output)
    assert code == 0, output[-4000:]
    assert "PASSED" in output
    assert "SKIPPED" not in output, output[-4000:]
    return output


def test_guests_of_both_kinds(runs: Runs) -> None:
    output = passed(runs["cortex-a57"])
    assert "guests can run and migrate here, on KVM only" in output
    for of_each in (
        "PASSED tests/hypervisor/kvm/arm64/test_vcpu.py",
        "[kvm-armv7-manual]",
        "[kvm-arm64-manual]",
    ):
        assert of_each in output


def test_where_kvm_is_in_the_kernel(runs: Runs) -> None:
    """VHE: the host's kernel runs at EL2, as KVM does."""
    passed(runs["max"])
