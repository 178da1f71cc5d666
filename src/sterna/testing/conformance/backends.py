"""The hypervisors that the suite compares, and the same small guests for each.

A program takes parameters p0 to p3. It ends with a store to `STOP`, a device that kicks its CPU. A hypervisor of your own is a
`Backend`: its programs, and how a CPU is made to begin with one.
"""

import importlib.util
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import numpy as np

from sterna.hypervisor.architecture import ARCHITECTURES
from sterna.hypervisor.interface import DirtyLogMode, ManualProtect, Vm
from sterna.memory.address import Ipa

RAM = Ipa(0x4000_0000)
"""Slot 0, never logged by itself: programs, page tables, lists."""
RAM_BYTES = 8 << 20
CODE = RAM + 0x8000
CODE_BYTES = 0x100
"""Room for each program."""
CELL = RAM + 0x9000
LIST = RAM + 0x10_0000
TABLES = RAM + 0x20_0000
STOP = Ipa(0x0A00_0000)
NOWHERE = Ipa(0x2000_0000)
"""No slot and no device is there."""


class Program(Enum):
    """What a guest does."""

    TOUCH = auto()
    """Store p2 to the first word of p1 pages from p0."""
    STORE_LIST = auto()
    """Store p2 to p1 addresses, which are listed at p0."""
    LOAD_LIST = auto()
    """Load from p1 addresses, which are listed at p0."""
    SCATTER = auto()
    """For ever store the word at p2 to a random one of p1 pages from p0; p3 is the seed."""
    SWEEP = auto()
    """For ever store growing numbers, the first p2 + 1, to p1 pages from p0, one after the other."""
    SPIN = auto()
    """For ever nothing."""


class Backend(ABC):
    """One hypervisor with one kind of guest.

    :ivar name: for test ids
    :ivar arch: of its CPUs, for those that ship
    :ivar modes: the ways it keeps a dirty log
    """

    name: str
    arch: str
    modes: tuple[DirtyLogMode, ...] = (DirtyLogMode.BITMAP, DirtyLogMode.MANUAL)

    def missing(self) -> str:
        """Why it cannot be had here; empty when it can."""
        return ""

    @abstractmethod
    def make_vm(self, smp: int, mode: DirtyLogMode, **options: Any) -> Vm:
        """A VM for so many vCPUs.

        :param options: of tests of one hypervisor only
        """

    @abstractmethod
    def code(self, program: Program) -> bytes:
        """Its instructions. They run at any address, and take no more than `CODE_BYTES`."""

    @abstractmethod
    def begin(self, vcpu: Any, entry: int, parameters: tuple[int, ...]) -> None:
        """Let a vCPU start at `entry`, with the program's parameters."""

    @abstractmethod
    def general(self, state: Any) -> Any:
        """A state's general registers, program counter and flags."""

    def prepare(self, write: Callable[[int, bytes], None]) -> None:  # noqa: B027
        """Put into RAM what the guests need besides their program."""


class EmulatedBackend(Backend):
    """The emulated hypervisor."""

    def missing(self) -> str:
        return "" if importlib.util.find_spec("unicorn") else "unicorn, the emulated CPU, is not installed"

    def make_vm(self, smp: int, mode: DirtyLogMode, **options: Any) -> Vm:
        from sterna.hypervisor.emulated.vm import EmulatedVm

        vm = EmulatedVm(smp, arch=self.arch, secondaries_off=False)
        vm.tlb_sizing.end()  # its flushes would hide that one is missing elsewhere
        if mode is DirtyLogMode.MANUAL:
            vm.enable_manual_protect(ManualProtect.ENABLE | ManualProtect.INITIALLY_SET)
        return vm


def _kvm_missing(arch: str) -> str:
    host = ARCHITECTURES.get(arch).kvm_host
    if platform.machine() != host:
        return f"{arch} guests need a host that is {host}, this one is {platform.machine()}"
    return "" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm is missing or not ours to open"


class KvmBackend(Backend):
    """This host's KVM."""

    def missing(self) -> str:
        return _kvm_missing(self.arch)

    def make_vm(self, smp: int, mode: DirtyLogMode, **options: Any) -> Vm:
        make: Callable[..., Vm] = ARCHITECTURES.get(self.arch).kvm.load()
        return make(smp, secondaries_off=False, dirty_log=mode, **options)


def _arm_kvm_modes() -> tuple[DirtyLogMode, ...]:
    """The kernel may be older than its dirty rings."""
    from sterna.hypervisor.kvm.system import Capability, System

    if not _kvm_missing("arm64"):
        with System() as system:
            if system.check(Capability.DIRTY_LOG_RING_ACQ_REL):
                return tuple(DirtyLogMode)
    return (DirtyLogMode.BITMAP, DirtyLogMode.MANUAL)


_ARMV7_STOP = (0xE5892000, 0xEAFFFFFE)  # str r2, [r9]; b .
_ARMV7_CODE = {
    # str r2, [r0]; add r0, r0, #4096; subs r1, r1, #1; bne
    Program.TOUCH: (0xE5802000, 0xE2800A01, 0xE2511001, 0x1AFFFFFB, *_ARMV7_STOP),
    # ldr r4, [r0], #4; str r2, [r4]; subs r1, r1, #1; bne
    Program.STORE_LIST: (0xE4904004, 0xE5842000, 0xE2511001, 0x1AFFFFFB, *_ARMV7_STOP),
    # ldr r4, [r0], #4; ldr r3, [r4]; subs r1, r1, #1; bne
    Program.LOAD_LIST: (0xE4904004, 0xE5943000, 0xE2511001, 0x1AFFFFFB, *_ARMV7_STOP),
    Program.SCATTER: (
        0xE306560D,  # movw r5, #0x660d
        0xE3405019,  # movt r5, #0x19
        0xE30F635F,  # movw r6, #0xf35f
        0xE3436C6E,  # movt r6, #0x3c6e
        0xE5924000,  # ldr r4, [r2]
        0xE0030593,  # mul r3, r3, r5
        0xE0833006,  # add r3, r3, r6
        0xE0878193,  # umull r8, r7, r3, r1
        0xE0807607,  # add r7, r0, r7, lsl #12
        0xE5874000,  # str r4, [r7]
        0xEAFFFFF8,  # b (ldr)
    ),
    Program.SWEEP: (
        0xE1A03000,  # mov r3, r0
        0xE1A04001,  # mov r4, r1
        0xE2822001,  # add r2, r2, #1
        0xE5832000,  # str r2, [r3]
        0xE2833A01,  # add r3, r3, #4096
        0xE2544001,  # subs r4, r4, #1
        0x1AFFFFFA,  # bne (add)
        0xEAFFFFF7,  # b (mov)
    ),
    Program.SPIN: (0xEAFFFFFE,),  # b .
}


class Armv7(Backend):
    """A hypervisor of ARMv7 guests."""

    arch = "armv7"

    def code(self, program: Program) -> bytes:
        return np.array(_ARMV7_CODE[program], "<u4").tobytes()

    def begin(self, vcpu: Any, entry: int, parameters: tuple[int, ...]) -> None:
        state = vcpu.get_state()
        state.regs[: len(parameters)] = parameters
        state.regs[9] = STOP
        state.begin(entry)
        vcpu.set_state(state)

    def general(self, state: Any) -> Any:
        return state.regs, state.cpsr


class EmulatedArmv7(EmulatedBackend, Armv7):
    name = "emulated-armv7"


class KvmArmv7(KvmBackend, Armv7):
    """On the stage-2 code that the emulated hypervisor is after."""

    name = "kvm-armv7"
    modes = _arm_kvm_modes()

    def missing(self) -> str:
        from sterna.hypervisor.kvm.system import Capability, System

        if why := super().missing():
            return why
        with System() as system:
            return "" if system.check(Capability.ARM_EL1_32BIT) else "this host's CPUs have no 32-bit guests"


_ARM64_STOP = (0xB9000122, 0x14000000)  # str w2, [x9]; b .
_ARM64_CODE = {
    # str w2, [x0]; add x0, x0, #4096; subs x1, x1, #1; b.ne
    Program.TOUCH: (0xB9000002, 0x91400400, 0xF1000421, 0x54FFFFA1, *_ARM64_STOP),
    # ldr w4, [x0], #4; str w2, [x4]; subs x1, x1, #1; b.ne
    Program.STORE_LIST: (0xB8404404, 0xB9000082, 0xF1000421, 0x54FFFFA1, *_ARM64_STOP),
    # ldr w4, [x0], #4; ldr w3, [x4]; subs x1, x1, #1; b.ne
    Program.LOAD_LIST: (0xB8404404, 0xB9400083, 0xF1000421, 0x54FFFFA1, *_ARM64_STOP),
    Program.SCATTER: (
        0x528CC1A5,  # mov w5, #0x660d
        0x72A00325,  # movk w5, #0x19, lsl #16
        0x529E6BE6,  # mov w6, #0xf35f
        0x72A78DC6,  # movk w6, #0x3c6e, lsl #16
        0xB9400044,  # ldr w4, [x2]
        0x1B051863,  # madd w3, w3, w5, w6
        0x9BA17C67,  # umull x7, w3, w1
        0xD360FCE7,  # lsr x7, x7, #32
        0x8B073007,  # add x7, x0, x7, lsl #12
        0xB90000E4,  # str w4, [x7]
        0x17FFFFFA,  # b (ldr)
    ),
    Program.SWEEP: (
        0xAA0003E3,  # mov x3, x0
        0xAA0103E4,  # mov x4, x1
        0x11000442,  # add w2, w2, #1
        0xB9000062,  # str w2, [x3]
        0x91400463,  # add x3, x3, #4096
        0xF1000484,  # subs x4, x4, #1
        0x54FFFF81,  # b.ne (add)
        0x17FFFFF9,  # b (mov)
    ),
    Program.SPIN: (0x14000000,),  # b .
}


class Arm64(Backend):
    """A hypervisor of AArch64 guests."""

    arch = "arm64"

    def code(self, program: Program) -> bytes:
        return np.array(_ARM64_CODE[program], "<u4").tobytes()

    def begin(self, vcpu: Any, entry: int, parameters: tuple[int, ...]) -> None:
        state = vcpu.get_state()
        state.x[: len(parameters)] = parameters
        state.x[9] = STOP
        state.begin(entry)
        vcpu.set_state(state)

    def general(self, state: Any) -> Any:
        return state.x, state.pc, state.pstate


class KvmArm64(KvmBackend, Arm64):
    name = "kvm-arm64"
    modes = _arm_kvm_modes()


_X86_STOP = "418911 ebfe"  # mov [r9], edx; jmp .
_X86_CODE = {
    # mov [rdi], edx; add rdi, 4096; dec rsi; jnz
    Program.TOUCH: "8917 4881c700100000 48ffce 75f2" + _X86_STOP,
    # mov eax, [rdi]; mov [rax], edx; add rdi, 4; dec rsi; jnz
    Program.STORE_LIST: "8b07 8910 4883c704 48ffce 75f3" + _X86_STOP,
    # mov eax, [rdi]; mov ecx, [rax]; add rdi, 4; dec rsi; jnz
    Program.LOAD_LIST: "8b07 8b08 4883c704 48ffce 75f3" + _X86_STOP,
    Program.SCATTER: (
        "8b02"  # mov eax, [rdx]
        "69c90d661900"  # imul ecx, ecx, 1664525
        "81c15ff36e3c"  # add ecx, 1013904223
        "4189c8"  # mov r8d, ecx
        "4c0fafc6"  # imul r8, rsi
        "49c1e820"  # shr r8, 32
        "49c1e00c"  # shl r8, 12
        "42890407"  # mov [rdi + r8], eax
        "ebdd"  # jmp
    ),
    Program.SWEEP: (
        "4989f8"  # mov r8, rdi
        "4989f2"  # mov r10, rsi
        "ffc2"  # inc edx
        "418910"  # mov [r8], edx
        "4981c000100000"  # add r8, 4096
        "49ffca"  # dec r10
        "75ef"  # jnz (inc)
        "ebe7"  # jmp (mov)
    ),
    Program.SPIN: "ebfe",  # jmp .
}


class KvmX86(KvmBackend):
    name = "kvm-x86_64"
    arch = "x86_64"
    modes = tuple(DirtyLogMode)

    def code(self, program: Program) -> bytes:
        return bytes.fromhex(_X86_CODE[program])

    def general(self, state: Any) -> Any:
        return state.regs

    def prepare(self, write: Callable[[int, bytes], None]) -> None:
        from sterna.arch.x86_64 import longmode

        write(TABLES, longmode.page_tables(TABLES))

    def begin(self, vcpu: Any, entry: int, parameters: tuple[int, ...]) -> None:
        from sterna.arch.x86_64 import longmode
        from sterna.arch.x86_64.state import MSR_KVM_SYSTEM_TIME

        state = vcpu.get_state()
        longmode.start(state, entry, 0, TABLES, 0)
        # Without a time record, which the kernel writes and logs: only the program writes.
        state.msrs[MSR_KVM_SYSTEM_TIME] = 0
        state.regs |= dict(zip(("rdi", "rsi", "rdx", "rcx"), parameters, strict=False)) | {"r9": STOP}
        vcpu.set_state(state)


BACKENDS: tuple[Backend, ...] = (EmulatedArmv7(), KvmX86(), KvmArmv7(), KvmArm64())
