"""The checks of `sterna doctor`, each against the host itself."""

import ctypes
import importlib.metadata
import mmap
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sterna.cli.errors import CliError
from sterna.host.limits import available_bytes, usable_cpus
from sterna.host.printable import describe
from sterna.host.units import format_size

_SMALL_MEMORY = 2 << 30
_EMULATED = ("numba", "unicorn", "stage 2")
"""What guests on the emulated CPU need."""
_PFN_PRESENT = 1 << 63


@dataclass(frozen=True)
class HostCheck:
    """One finding.

    :ivar needed: nothing works without it
    :ivar advice: what to do, when not `ok`; `run_checks` gives none else
    """

    name: str
    ok: bool
    found: str
    needed: bool = False
    advice: str = ""


def run_checks() -> list[HostCheck]:
    """All checks; none takes more than a few seconds once kernels are compiled. Where guests run on KVM, nothing that only the
    emulated CPU needs is needed.
    """
    checks = [replace(found, advice="") if found.ok else found for found in (check() for check in _CHECKS)]
    if any(check.name == "kvm" and check.ok for check in checks):
        checks = [replace(one, needed=False) if one.name in _EMULATED else one for one in checks]
    return checks


def _python() -> HostCheck:
    version = ".".join(map(str, sys.version_info[:3]))
    return HostCheck("python", sys.version_info >= (3, 11), version, True, "3.11 or later is needed")


def _package(name: str, why: str) -> Callable[[], HostCheck]:
    def check() -> HostCheck:
        try:
            return HostCheck(name, True, importlib.metadata.version(name), True)
        except importlib.metadata.PackageNotFoundError:
            return HostCheck(name, False, "not installed", True, f"{why}: pip install {name}")

    return check


def _emulation() -> HostCheck:
    """A guest program runs behind stage 2 until it has shown signs of life."""
    name = "stage 2"
    try:
        numbers = _run_a_guest("emulated")
    except Exception as error:  # whatever keeps guests from running is the finding
        return HostCheck(name, False, describe(error), True, "see the message")
    faults = numbers["faults_translation"]
    return HostCheck(name, True, f"a guest runs; {faults} pages or blocks mapped on demand", True)


def _run_a_guest(accel: str) -> dict[str, int]:
    """Run a small guest until it has shown signs of life: the hypervisor's statistics.

    :raise CliError: When it does not run. Other errors are those of `Machine`.
    """
    import time

    from sterna.cli.kernels import prepare_kernels
    from sterna.guests.layout import STATUS_BYTES, STATUS_OFFSET, StatusError, read_status
    from sterna.machine.config import MEBIBYTE, MachineConfig
    from sterna.machine.machine import Machine

    prepare_kernels(accel)
    config = MachineConfig(accel=accel, memory_bytes=16 * MEBIBYTE, kernel="dirtyram", append="64 16 1")
    with Machine(config) as machine:
        machine.cont()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            page = machine.read_physical(config.board.ram_base + STATUS_OFFSET, STATUS_BYTES)
            try:
                if read_status(page).steps() > 1:
                    return machine.statistics()
            except StatusError:
                pass  # it has not come that far
            time.sleep(0.01)
        state = machine.error or f"state {machine.run_state.value}"
    raise CliError(f"a small guest does not run: {state}")


def _huge_pages() -> HostCheck:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    slower = "guest RAM uses 4 KiB pages; "
    try:
        setting = path.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        found, advice = "the kernel has no transparent huge pages", f"{slower}migration is slower"
        return HostCheck("huge pages", False, found, advice=advice)
    advice = f"{slower}echo madvise > {path} makes migration faster"
    return HostCheck("huge pages", setting != "never", f"transparent huge pages: {setting}", advice=advice)


def _memory() -> HostCheck:
    available = available_bytes()
    if available is None:
        return HostCheck("memory", False, "unknown", advice="/proc/meminfo does not tell")
    found = f"{format_size(available)} available, {usable_cpus()} CPUs"
    advice = "the demo's default wants two guests of 1.75 GiB: give a smaller --memory and --append"
    return HostCheck("memory", available >= 2 * _SMALL_MEMORY, found, advice=advice)


def _kvm() -> HostCheck:
    """VMs are made, one for each way to keep a dirty log, and a guest runs in one."""
    from sterna.hypervisor.accelerator import ACCELERATORS, open_vm
    from sterna.hypervisor.interface import DirtyLogMode, HypervisorError
    from sterna.machine.board import BOARDS

    name, board = "kvm", BOARDS.get(ACCELERATORS.get("kvm").board)
    modes: list[str] = []
    refusal = ""
    for mode in DirtyLogMode:
        try:
            open_vm("kvm", board.arch, dirty_log=mode).close()
            modes.append(mode)
        except HypervisorError as error:
            refusal = refusal or str(error).removeprefix("accel kvm: ")
    if not modes:
        return HostCheck(name, False, refusal, advice="guests run on the emulated CPU, which needs no KVM")
    try:
        _run_a_guest("kvm")
    except Exception as error:  # as with the emulated CPU
        return HostCheck(name, False, f"board {board.name}: {describe(error)}", advice="see the message")
    return HostCheck(name, True, f"a guest runs on board {board.name}; dirty log as {', '.join(modes)}")


def _qemu() -> HostCheck:
    name = "qemu-system-arm"
    path = shutil.which(name)
    if path is None:
        advice = "only to migrate to and from QEMU: apt install qemu-system-arm"
        return HostCheck(name, False, "not installed", advice=advice)
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return HostCheck(name, False, f"{path}: {error}", advice="it is installed and does not run")
    return HostCheck(name, True, done.stdout.splitlines()[0] if done.stdout else path)


def _pagemap() -> HostCheck:
    """Whether the kernel tells which pages of a process are populated: zero pages then cost nothing to find."""
    name = "pagemap"
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as memory, open("/proc/self/pagemap", "rb", buffering=0) as file:
            memory[0] = 1
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            file.seek(address // mmap.PAGESIZE * 8)
            present = bool(struct.unpack("<Q", file.read(8))[0] & _PFN_PRESENT)
        found = "readable" if present else "does not tell"
    except (OSError, struct.error) as error:
        present, found = False, f"/proc/self/pagemap: {error}"
    return HostCheck(name, present, found, advice="RAM that was never touched is read when it is sent")


_CHECKS: tuple[Callable[[], HostCheck], ...] = (
    _python,
    _package("numba", "it compiles the stage-2 fault path"),
    _package("unicorn", "it emulates the CPU"),
    _emulation,
    _memory,
    _huge_pages,
    _pagemap,
    _kvm,
    _qemu,
)
