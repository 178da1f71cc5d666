"""The tests of KVM on arm64, where they can run: inside the emulated host."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from tests.arm64.conftest import TREE, Run

from sterna.testbed.armhost import image
from sterna.testbed.armhost.recipe import recipe_for
from sterna.testbed.debian.cache import Image
from sterna.testbed.errors import ImageError

pytestmark = [pytest.mark.arm64host, pytest.mark.qemu, pytest.mark.slow]

PYTEST = "python3 -m pytest -q -x -rps --assert=plain -p no:cacheprovider -p no:hypothesispytest"
"""Assertions are left as they are: to rewrite them takes the emulated CPU as long as to run the tests."""
SUITE = "tests/hypervisor/conformance"
FEW = "exactly or test_oracle and not with and not memory or slot_deleted or c126d94f"
"""Tests of the suite: one boot has time for the kernel's oracle, and some cases."""
OTHERS = "tests/arch/arm/kvm/test_vcpu.py"

IN_RING_MODE = (
    "exactly",
    "test_oracle[",
    "c126d94f",
    "a216e24f",
    "530a8ba7",
    "a_full_ring",
    "a_ring_filled",
    "sizes_of_rings",
    "switching_a_live_log",
)
"""Tests of rings: what goes through them, that pages are protected again, blocks, full rings, sizes."""
IN_VHE = f"kvm-arm64 and (exactly or be097997) or kvm-arm64-ring and ({' or '.join(IN_RING_MODE)})"

# One run of pytest each: to start it takes the emulated CPU longer than most tests.
COMMANDS = {
    "cortex-a57": f"python3 -m sterna doctor && {PYTEST} {OTHERS} {SUITE}"
    f" -k 'test_vcpu or (kvm-armv7 or kvm-arm64) and ({FEW})'",
    "max": f"dmesg | grep -q 'VHE mode initialized' && uname -r && {PYTEST} {OTHERS} {SUITE}"
    f" -k 'test_vcpu or {IN_VHE}'",
}
"""What runs in the host, by its CPU."""


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    :ivar fallback: why its host has Debian's stable kernel and not the later one; empty when it has it
    """

    code: int
    output: str
    fallback: str = ""


Runs = dict[str, Future[Outcome]]


class _Over(Exception):
    """The tests are."""


@pytest.fixture(scope="module")
def runs(arm64_image: Image, in_arm64_host: Run) -> Iterator[Runs]:
    """All hosts at once: each is busy on one of its CPUs most of the time. One is built while the other runs already."""
    over = threading.Event()

    def check() -> None:
        if over.is_set():
            raise _Over

    def run(cpu: str) -> Outcome:
        built, why = later_kernel(arm64_image) if cpu == "max" else (arm64_image, "")
        code, output = in_arm64_host("sh", "-c", COMMANDS[cpu], image=built, cpu=cpu, check=check)
        return Outcome(code, output, why)

    with ThreadPoolExecutor(len(COMMANDS)) as threads:
        yield {cpu: threads.submit(run, cpu) for cpu in COMMANDS}
        over.set()


def later_kernel(stable: Image) -> tuple[Image, str]:
    """The host with Debian's later kernel, which has dirty rings. Where it cannot be had, the stable one, and why."""
    try:
        return image.obtain(recipe_for(TREE, "backports")), ""
    except ImageError as error:
        return stable, f"{error}"


def passed(run: Future[Outcome]) -> Outcome:
    """A command whose tests have all passed, and none was left out."""
    outcome = run.result()
    print(outcome.output)
    assert outcome.code == 0, outcome.output[-4000:]
    assert "PASSED" in outcome.output
    assert "SKIPPED" not in outcome.output, outcome.output[-4000:]
    return outcome


def test_guests_of_both_kinds(runs: Runs) -> None:
    output = passed(runs["cortex-a57"]).output
    assert "guests can run and migrate here, on KVM only" in output
    for of_each in (
        "PASSED tests/arch/arm/kvm/test_vcpu.py",
        "[kvm-armv7-manual]",
        "[kvm-arm64-manual]",
    ):
        assert of_each in output


def test_where_kvm_is_in_the_kernel(runs: Runs) -> None:
    """VHE: the host's kernel runs at EL2, as KVM does. Guests of 32 bits are short programs, one after the other in the same
    memory: each has to run its own.
    """
    assert "PASSED tests/arch/arm/kvm/test_vcpu.py" in passed(runs["max"]).output


def test_dirty_rings(runs: Runs) -> None:
    """Ran in the host of the test before, where its kernel has them."""
    outcome = passed(runs["max"])
    if outcome.fallback:
        pytest.skip(f"Linux {outcome.output.split()[0]} has no dirty rings; a later one: {outcome.fallback}")
    ran = [
        line
        for line in outcome.output.splitlines()
        if line.startswith("PASSED ") and "[kvm-arm64-ring" in line
    ]
    for test in IN_RING_MODE:
        assert any(test in line for line in ran), test
