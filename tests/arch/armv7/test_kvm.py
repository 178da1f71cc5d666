"""An ARMv7 guest's registers in the kernel's AArch64 ones (no KVM needed)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sterna.arch.arm import sysreg
from sterna.arch.arm.kvm import onereg
from sterna.arch.armv7.kvm import read_state, write_state
from sterna.arch.armv7.state import ArmVcpuState

WORD = st.integers(0, (1 << 32) - 1)
DOUBLE = st.integers(0, (1 << 64) - 1)
MODES = {"usr": 0x10, "fiq": 0x11, "irq": 0x12, "svc": 0x13, "abt": 0x17, "und": 0x1B, "sys": 0x1F}
BANKS = ("usr", "fiq", "irq", "svc", "abt", "und")


class Kernel(dict):
    """A vCPU's registers, all zero at first."""

    def __missing__(self, register):
        return 0

    def read(self, register):
        return self[register] or (0x1D3 if register == onereg.PSTATE else 0)


CP15 = tuple(read_state(Kernel().read, False).cp15)


@st.composite
def states(draw):
    """States as a CPU shows them: the current mode's bank repeats the registers in use."""
    mode = draw(st.sampled_from(sorted(MODES)))
    bank = "usr" if mode == "sys" else mode
    regs = [draw(WORD) for _ in range(16)]
    banked = {f"{name}_{each}": draw(WORD) for each in BANKS for name in ("sp", "lr")}
    banked |= {f"spsr_{each}": draw(WORD) for each in BANKS[1:]}
    banked |= {f"r{i}_{each}": draw(WORD) for each in ("usr", "fiq") for i in range(8, 13)}
    banked |= {f"sp_{bank}": regs[13], f"lr_{bank}": regs[14]}
    banked |= {f"r{i}_{'fiq' if bank == 'fiq' else 'usr'}": regs[i] for i in range(8, 13)}
    return ArmVcpuState(
        regs=regs,
        cpsr=MODES[mode] | draw(st.sampled_from((0, 0x1C0, 0xF000_01E0))),
        banked=banked,
        cp15={register: draw(DOUBLE if register & 1 << 52 else WORD) for register in CP15},
        vfp=[draw(DOUBLE) for _ in range(32)],
        fpscr=draw(WORD) & 0xFFFF_9F9F,
        fpexc=draw(WORD),
        counter=0,
        powered_off=draw(st.booleans()),
    )


@given(states())
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_again(state):
    kernel = Kernel()
    write_state(state, kernel.__setitem__)
    assert read_state(kernel.read, state.powered_off) == state


@pytest.mark.parametrize(
    ("name", "register"),
    [  # ARM DDI 0487, D1.20.1
        ("sp_usr", 13),
        ("lr_usr", 14),
        ("lr_irq", 16),
        ("sp_irq", 17),
        ("lr_svc", 18),
        ("sp_svc", 19),
        ("lr_abt", 20),
        ("sp_abt", 21),
        ("lr_und", 22),
        ("sp_und", 23),
        ("r8_fiq", 24),
        ("r12_fiq", 28),
        ("sp_fiq", 29),
        ("lr_fiq", 30),
    ],
)
def test_banked_registers_are_where_the_architecture_has_them(name, register):
    kernel = Kernel({onereg.general(register): 0x1234_5678})
    assert read_state(kernel.read, False).banked[name] == 0x1234_5678


def test_halves_of_wide_registers():
    far = sysreg.encode(3, 0, 6, 0, 0)
    state = read_state(Kernel({far: 0x1111_2222_3333_4444}).read, False)
    assert state.cp15[0x4020_0000_000F_3000] == 0x3333_4444  # DFAR
    assert state.cp15[0x4020_0000_000F_3002] == 0x1111_2222  # IFAR


def test_the_timers_ids_are_exchanged_as_the_kernel_has_them():
    # Linux, arch/arm64/include/uapi/asm/kvm.h: KVM_REG_ARM_TIMER_CVAL and KVM_REG_ARM_TIMER_CNT
    assert sysreg.CNTVCT == 0x6030_0000_0013_DF1A
    assert sysreg.CNTV_CVAL == 0x6030_0000_0013_DF02
    assert sysreg.CNTV_CTL == 0x6030_0000_0013_DF19
    assert sysreg.CNTPCT == 0x6030_0000_0013_DF01  # KVM_REG_ARM_PTIMER_CNT
    state = read_state(Kernel({sysreg.CNTVCT: 5, sysreg.CNTV_CVAL: 9}).read, False)
    assert state.counter == 5
    assert state.cp15[0x4030_0000_000F_0718] == 9  # CNTV_CVAL


def test_what_is_above_a_register_of_32_bits_is_not_its_value():
    """A vCPU's registers begin with a pattern of 64 bits in KVM."""
    pattern = 0x1DE7_EC7E_DBAD_C0DE

    class New(Kernel):
        def __missing__(self, register):
            return pattern

    state = read_state(New({onereg.PSTATE: 0x1D3}).read, False)
    for register, value in state.cp15.items():
        assert value in ({pattern} if register & 1 << 52 else {pattern & 0xFFFF_FFFF, pattern >> 32}), (
            f"{register:#x}"
        )
    assert state.fpexc == pattern & 0xFFFF_FFFF
