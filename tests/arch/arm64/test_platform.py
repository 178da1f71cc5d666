"""What an AArch64 machine saves of its CPUs' time (no KVM needed)."""

import pytest

from sterna.arch.arm.sysreg import CNTPCT, CNTV_CTL, CNTV_CVAL
from sterna.arch.arm64.platform import Arm64Platform
from sterna.arch.arm64.section import load_cpu
from sterna.arch.arm64.state import Arm64VcpuState
from sterna.boards.virt_arm64 import BOARD as VIRT_ARM64
from sterna.machine.devices.device import Stopped

TOP = 1 << 64


class Cpu:
    """A CPU whose counters have gone on since its VM stopped."""

    def __init__(self, index, counter, system):
        self.index = index
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
    cpus = [Cpu(0, now, {CNTPCT: (now + lead) % TOP}), Cpu(1, now + 1, {})]
    platform = Arm64Platform(VIRT_ARM64, cpus)
    saved = platform.save(Stopped(stopped))
    first, second = (load_cpu(section, stopped) for section in saved)
    assert (first.counter, first.system[CNTPCT]) == (stopped, (stopped + lead) % TOP)
    assert first.system[CNTV_CVAL] == 7
    assert CNTPCT not in second.system, "a kernel before Linux 6.4 has it fixed to the host's"
