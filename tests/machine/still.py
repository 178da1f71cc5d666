"""A hypervisor whose vCPUs never run: machines of every board on every host, with states that a test chooses."""

import copy
import random
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from sterna.arch.arm.sysreg import CNTPCT, CNTV_CTL, CNTV_CVAL
from sterna.arch.arm64.state import Arm64VcpuState
from sterna.arch.armv7.cp15 import REGISTERS
from sterna.arch.armv7.state import ArmVcpuState
from sterna.arch.x86_64.state import (
    CONTROL_REGISTERS,
    EVENT_PARTS,
    GENERAL_REGISTERS,
    SEGMENT_PARTS,
    SEGMENTS,
    Leaf,
    X86VcpuState,
)
from sterna.hypervisor.accelerator import ACCELERATORS, Accelerator
from sterna.hypervisor.architecture import Architecture
from sterna.hypervisor.interface import DirtyLogMode, Exit, ExitReason

NAME = "still"
COUNTER = 123_456_789
KNOWN = sorted(REGISTERS)


class StillVcpu:
    """A vCPU with a state, which stands still until it is kicked."""

    def __init__(self, index: int, state: Any) -> None:
        self.index = index
        self.state = state
        self._kicked = threading.Event()

    def get_state(self) -> Any:
        return copy.deepcopy(self.state)

    def set_state(self, state: Any) -> None:
        self.state = copy.deepcopy(state)

    def set_interrupt(self, level: bool) -> None:
        pass

    def set_timer_wakes(self, enabled: bool) -> None:
        pass

    def sleep(self, ns: int) -> None:
        pass

    def run(self) -> Exit:
        self._kicked.wait()
        self._kicked.clear()
        return Exit(ExitReason.INTR)

    def kick(self) -> None:
        self._kicked.set()

    def wake(self) -> None:
        pass


class StillVm:
    """Keeps what it is given.

    :ivar dirty: pages that the host has written, as (slot, first page, count)
    """

    log_page_bits = 12

    def __init__(self, arch: str) -> None:
        self.counter_hz = {"armv7": 62_500_000, "arm64": 62_500_000, "x86_64": 1_000_000_000}[arch]
        self.dirty: list[tuple[int, int, int]] = []
        self._arch = arch
        self._counter = COUNTER
        self._devices: list[tuple[int, int, Any]] = []

    def set_memory_slot(self, slot: Any) -> None:
        pass

    def mark_dirty(self, slot: int, first_page: int, num_pages: int) -> None:
        self.dirty.append((slot, first_page, num_pages))

    def create_vcpu(self, index: int) -> StillVcpu:
        return StillVcpu(index, STATES[self._arch](random.Random(f"cpu {index}")))

    def add_mmio(self, ipa: int, size: int, device: Any) -> None:
        self._devices.append((ipa, size, device))

    def counter(self) -> int:
        return self._counter

    def set_counter(self, value: int) -> None:
        self._counter = value

    def close(self) -> None:
        pass

    def read(self, ipa: int, size: int = 4, cpu: int = 0) -> int:
        """As a guest's vCPU reads from a device."""
        base, device = self._at(ipa)
        value: int = device.mmio_read(ipa - base, size, cpu)
        return value

    def write(self, ipa: int, value: int, size: int = 4, cpu: int = 0) -> None:
        """As a guest's vCPU writes to a device."""
        base, device = self._at(ipa)
        device.mmio_write(ipa - base, size, value, cpu)

    def _at(self, ipa: int) -> tuple[int, Any]:
        return next((base, device) for base, size, device in self._devices if base <= ipa < base + size)


def still_accelerator(made: list[StillVm]) -> None:
    """Register it as accelerator `NAME`; the VMs that it makes are added to `made`."""

    def create(architecture: Architecture, vcpus: int, dirty_log: DirtyLogMode, secondaries_off: bool) -> Any:
        made.append(StillVm(architecture.name))
        return made[-1]

    ACCELERATORS.add(NAME, Accelerator(NAME, lambda architecture: None, create, "virt", tuple(DirtyLogMode)))


class SocketTap:
    """In place of a host's tap: a network that nobody is on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setblocking(False)

    def fileno(self) -> int:
        return self._near.fileno()

    def receive(self) -> bytes | None:
        try:
            return self._near.recv(1 << 17)
        except BlockingIOError:
            return None

    def send(self, frame: bytes) -> bool:
        return self._near.send(frame) > 0

    def close(self) -> None:
        self._near.close()
        self.far.close()


def _words(chance: random.Random, names: Sequence[str], bits: int = 64) -> dict[str, int]:
    return {name: chance.getrandbits(bits) for name in names}


def _armv7(chance: random.Random) -> ArmVcpuState:
    banks = ("usr", "svc", "abt", "und", "irq", "fiq")
    names = [
        f"{kind}_{bank}" for kind in ("sp", "lr", "spsr") for bank in banks if (kind, bank) != ("spsr", "usr")
    ]
    names += [f"r{number}_{bank}" for number in range(8, 13) for bank in ("usr", "fiq")]
    state = ArmVcpuState(
        regs=[chance.getrandbits(32) for _ in range(16)],
        cpsr=0x6000_01D3,
        banked=_words(chance, names, 32),
        cp15={register: chance.getrandbits(64 if register >> 52 & 0xF == 3 else 32) for register in KNOWN},
        vfp=[chance.getrandbits(64) for _ in range(32)],
        fpscr=chance.getrandbits(32),
        fpexc=1 << 30,
        counter=0,
    )
    # The bank of the current mode repeats the registers.
    state.banked |= {"sp_svc": state.regs[13], "lr_svc": state.regs[14]}
    state.banked |= {f"r{number}_usr": state.regs[number] for number in range(8, 13)}
    return state


def _arm64(chance: random.Random) -> Arm64VcpuState:
    return Arm64VcpuState(
        x=[chance.getrandbits(64) for _ in range(31)],
        **_words(chance, ("sp_el0", "sp_el1", "elr_el1", "pc")),
        pstate=0x3C5,
        spsr=[chance.getrandbits(64) for _ in range(5)],
        v=[chance.getrandbits(128) for _ in range(32)],
        **_words(chance, ("fpsr", "fpcr"), 32),
        system={
            CNTV_CTL: 1,
            CNTV_CVAL: COUNTER - 1,
            CNTPCT: COUNTER + 7,
            0x6030_0000_0013_C080: chance.getrandbits(64),
        },
        counter=COUNTER,
    )


def _x86_64(chance: random.Random) -> X86VcpuState:
    def parts(widths: dict[str, int]) -> dict[str, int]:
        return {name: chance.getrandbits(bits) for name, bits in widths.items()}

    return X86VcpuState(
        cpuid=[Leaf(function, 0, 0, *(chance.getrandbits(32) for _ in range(4))) for function in range(3)],
        regs=_words(chance, GENERAL_REGISTERS),
        segments={name: parts(SEGMENT_PARTS) for name in SEGMENTS},
        gdt=(chance.getrandbits(64), 0x7F),
        idt=(chance.getrandbits(64), 0xFFF),
        control=_words(chance, CONTROL_REGISTERS),
        interrupts=[0, 0, 0, 1 << 63],
        xcrs={0: 7},
        xsave=chance.randbytes(832),
        msrs={0x10: chance.getrandbits(64), 0xC000_0100: chance.getrandbits(64)},
        events=parts(EVENT_PARTS),
        debug=[chance.getrandbits(64) for _ in range(6)],
        mp_state=0,
        tsc_khz=2_000_000,
    )


STATES: dict[str, Callable[[random.Random], Any]] = {
    "armv7": _armv7,
    "arm64": _arm64,
    "x86_64": _x86_64,
}
"""A vCPU's state of each architecture, with a value of its own in every register."""
