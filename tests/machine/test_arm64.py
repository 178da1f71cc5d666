"""What an AArch64 machine saves of its CPUs' time (no KVM needed)."""

import pytest

from sterna.boards.virt_arm64 import BOARD as VIRT_ARM64
from sterna.hypervisor.arm64 import CNTPCT, CNTV_CTL, CNTV_CVAL, Arm64VcpuState
from sterna.machine.platforms import Common
from sterna.machine.platforms.arm64 import Arm64Platform
from sterna.machine.state.arm64 import ARM64_CPU, load_cpu

TOP = 1 << 64


class Vm:
    counter_hz = 1_000_000_000

    def add_mmio(self, ipa, size, device):
        pass


class Cpu:
    """A CPU whose counters have gone on since its VM stopped."""

    def __init__(self, counter, system):
        self._state = Arm64VcpuState(
            x=[0] * 31,
            sp_el0=0,
            sp_el1=0,
            elr_el1=0,
            pc=0,
            pstate=0x3C5,
            spsr=[0] * 5,
            v=[0] * 32,
            fpsr=0,
            fpcr=0,
            system={CNTV_CTL: 0, CNTV_CVAL: 7} | system,
            counter=counter,
        )

    def get_state(self):
        return self._state

    def set_interrupt(self, level):
        pass

    def set_timer_wakes(self, enabled):
        pass


@pytest.mark.parametrize(
    ("stopped", "now", "lead"), [(1000, 5000, 300), (1000, 5000, -3000), (10, TOP - 10, 15)]
)
def test_counters_are_saved_as_of_when_the_machine_stopped(stopped, now, lead):
    """All of them: CNTVCT stands still from then on, and CNTPCT is as far ahead of it as the guest has seen it."""
    platform = Arm64Platform(Vm(), VIRT_ARM64, [Cpu(now, {CNTPCT: (now + lead) % TOP}), Cpu(now + 1, {})])
    saved = platform.save(Common(stopped, (), None))
    first, second = (load_cpu(section, stopped) for section in saved if section.name == ARM64_CPU.name)
    assert (first.counter, first.system[CNTPCT]) == (stopped, (stopped + lead) % TOP)
    assert first.system[CNTV_CVAL] == 7
    assert CNTPCT not in second.system, "a kernel before Linux 6.4 has it fixed to the host's"
