"""How a Linux guest is asked.

Its program is one of sterna's, as a process, with the same status page. That page's physical address is told on the
console at the start, so it is read from outside like any. The program's memory is read through a vCPU's own page tables.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sterna.guests.check import check_ram, check_state
from sterna.guests.layout import (
    PAGE_BYTES,
    STATUS_BYTES,
    STATUS_OFFSET,
    WORK_OFFSET,
    ProgramId,
    RandomWord,
    Status,
)
from sterna.launch.console import Console, Line
from sterna.launch.errors import VmError
from sterna.launch.guestview import pages_in_use
from sterna.launch.process import QemuProcess, VmProcess
from sterna.testbed.errors import BedError
from sterna.testbed.guest import ObservedGuest

_BASE = 0x10000000
"""RAM_BASE of the programs, a virtual address (guests/src/guest.h)."""
_STATUS_LINE = re.compile(r"^status page at 0x([0-9a-f]{8}) 0x([0-9a-f]{8})\r?$", re.M)
_ENDED_LINE = re.compile(r"^sterna: .*(?:ended with|cannot be mounted).*$|Kernel panic.*$", re.M)
_PROGRAM_LINE = re.compile(r"(?:clock|dirtyram|random): ")
_LAST_LINES = 8
_TRIES = 200


@dataclass(frozen=True)
class GuestIdentity:
    """What belongs to a guest on whichever host it runs.

    :ivar disk: its root file system, a file of the shared directory
    :ivar console: of the VM that it started in
    """

    disk: str
    console: Console


class LinuxProcess(QemuProcess):
    """A QEMU process, and the guest that it has."""

    identity: GuestIdentity


class LinuxGuest(ObservedGuest):
    """A program of sterna's under Linux."""

    def warmed_up(self, vm: VmProcess) -> bool:
        try:
            if ended := _ENDED_LINE.search(_console(vm)):
                raise VmError(f"the guest of the {vm.name} gave up: {ended[0].strip()}")
            return super().warmed_up(vm)
        except VmError as error:
            raise VmError(f"{error}{self.last_words(vm)}") from error

    def status_address(self, vm: VmProcess) -> int | None:
        told = _STATUS_LINE.search(_console(vm))
        return None if told is None else int(told[1] + told[2], 16)

    def last_words(self, vm: VmProcess) -> str:
        lines = [line.rstrip() for line in _console(vm).splitlines() if line.strip()]
        if not lines:
            return "; its console is empty"
        return "\nits console's last lines:\n" + "\n".join(f"  {line}" for line in lines[-_LAST_LINES:])

    def own_lines(self, lines: Sequence[Line]) -> list[Line]:
        """What came before is the kernel's."""
        first = next((at for at, line in enumerate(lines) if _PROGRAM_LINE.match(line.text)), len(lines))
        return list(lines[first:])

    def check(self, vm: VmProcess) -> tuple[int, list[str]]:
        """Compares all pages; those that the guest has swapped out cannot be seen, and its program's own word is taken."""
        ran = vm.runs()
        for _ in range(_TRIES):
            vm.command("stop")
            try:
                status = self.mark(vm)
                cpu = self._cpu_in_program(vm, status)
                if cpu is not None:
                    return self._compare(vm, status, cpu)
            finally:
                if ran:
                    vm.command("cont")
        raise BedError(f"no CPU of the {vm.name} was seen running the guest's program")

    def _compare(self, vm: VmProcess, status: Status, cpu: int) -> tuple[int, list[str]]:
        used = pages_in_use(status)
        ram = np.zeros(WORK_OFFSET + used * PAGE_BYTES, np.uint8)
        ram[STATUS_OFFSET : STATUS_OFFSET + STATUS_BYTES] = np.frombuffer(
            status.record.tobytes(), dtype=np.uint8
        )
        try:
            if used:
                work = vm.virtual_memory(_BASE + WORK_OFFSET, used * PAGE_BYTES, cpu)
                ram[WORK_OFFSET:] = np.frombuffer(work, np.uint8)
        except VmError:
            return used, self._own_verdict(status)
        return used, check_ram(ram)

    @staticmethod
    def _own_verdict(status: Status) -> list[str]:
        """What the program found itself: `random` reads each page back before it writes it."""
        problems = check_state(status)
        if status.program is not ProgramId.RANDOM:
            return [*problems, "pages are swapped out, and this program does not check them itself"]
        for cpu in range(status.cpus):
            if errors := status.word(cpu, RandomWord.ERRORS):
                problems.append(f"cpu {cpu}: the guest itself found {errors} errors")
        return problems

    def _cpu_in_program(self, vm: VmProcess, status: Status) -> int | None:
        """A vCPU whose page tables are the program's: it runs it, or is idle and ran it last."""
        for cpu in range(len(vm.command("query-cpus-fast"))):
            try:
                seen = vm.virtual_memory(_BASE + STATUS_OFFSET, STATUS_BYTES, cpu)
            except VmError:
                continue
            if bytes(seen) == status.record.tobytes():
                return cpu
        return None


def _console(vm: VmProcess) -> str:
    """What the guest said where it started."""
    assert isinstance(vm, LinuxProcess)
    return vm.identity.console.text()
