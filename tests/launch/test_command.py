"""The command lines that virtual machines are started with, by each of those that start some."""

import re
import shlex
import subprocess
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

import pytest

from sterna.bench.machines import machine_pair
from sterna.bench.workloads import VARIANTS, WORKLOADS
from sterna.cli import run
from sterna.cli.demorun import DemoSettings, run_demo
from sterna.cli.display import choose_display
from sterna.errors import Error
from sterna.guests.catalog import find
from sterna.launch.command import qemu_arguments, sterna_arguments
from sterna.launch.errors import VmError
from sterna.launch.host import Host
from sterna.launch.process import VmProcess
from sterna.launch.qemu import Qemu
from sterna.launch.signals import Interrupts
from sterna.machine.config import MachineConfig
from sterna.machine.nicconfig import NicConfig
from sterna.testbed.kind import KindOptions, VmKind
from sterna.testbed.kinds.qemu import QemuKind
from sterna.testbed.network import GuestNic
from sterna.testbed.settings import VmSettings
from sterna.testbed.sternakind import SternaKind

HOST = Host("here", "10.0.0.1")
NIC = GuestNic("tap7", "52:54:00:00:00:01", "10.0.9.1")
SETTINGS = VmSettings(memory="16M", smp=2, arguments="100 10 5")
SHARED = VmSettings(memory="16M", smp=2, arguments="100 10 5", shared_ram=True)
NET = VmSettings(memory="16M", program="net")
MORE = KindOptions(arguments=("--dirty-log", "manual"))
MACHINE = "--memory 16777216B --accel emulated --dirty-log bitmap"
CARD = "--nic tap,ifname=tap7,mac=52:54:00:00:00:01"
CONSOLE = "--serial file:/dev/fd/N"
QMP = "-nodefaults -display none -chardev socket,id=qmp,fd=N,server=on,wait=off -mon chardev=qmp,mode=control"
QEMU_CONSOLE = "-chardev file,id=serial,path=/dev/fd/N -serial chardev:serial"
PROGRAM = shlex.quote(str(find("dirtyram", "virt")))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What follows the program's name, descriptors as N. In its place another program runs, which ends at once."""
    found: list[str] = []

    def start(vm: VmProcess, qmp: int, serial: int, errors: int) -> "subprocess.Popen[bytes]":
        words = [str(word) for word in vm._command(qmp, serial)]
        line = shlex.join(words[words.index("run") if "run" in words else 1 :])
        line = re.sub(rf"(fd[/:=])(?:{qmp}|{serial})\b", r"\1N", line)
        found.append(re.sub(r"/proc/\d+/fd/\d+", "/proc/P/fd/N", line))
        return subprocess.Popen(["true"])

    monkeypatch.setattr(VmProcess, "_start", start)
    return found


@pytest.mark.parametrize(
    ("config", "machine"),
    [
        ({}, "--machine virt --smp 1 --memory 134217728B --accel emulated --dirty-log bitmap"),
        (
            {"machine": "vexpress-a15", "smp": 2, "memory_bytes": 32 << 20, "dirty_log": "manual"},
            "--machine vexpress-a15 --smp 2 --memory 33554432B --accel emulated --dirty-log manual",
        ),
    ],
)
def test_of_the_demo(started: list[str], config: dict[str, object], machine: str) -> None:
    settings = DemoSettings(MachineConfig(kernel="dirtyram", append="100 10 5", **config), 0, 300, True)
    with choose_display(json=True) as display, suppress(Error):
        run_demo(settings, display, Interrupts())
    assert started == [
        f"run {machine} --kernel dirtyram --append '100 10 5' --name source {CONSOLE} --qmp fd:N",
        f"run {machine} --incoming tcp:127.0.0.1:0 --name destination {CONSOLE} --qmp fd:N",
    ]


def measure(variant: str, workload: str, config: MachineConfig) -> None:
    """As far as that its two VMs have been started."""
    pair = machine_pair(VARIANTS[variant], WORKLOADS[workload], config, "qemu", lambda: None)
    with suppress(VmError), pair:
        pass


def test_of_a_measurement(started: list[str]) -> None:
    measure("sterna", "dirty-1g", MachineConfig(kernel="/image", append="100 10 5", smp=2))
    machine = "--machine virt --smp 2 --memory 134217728B --accel emulated --dirty-log bitmap"
    assert started == [
        f"run {machine} --kernel /image --append '100 10 5' --serial null --name source --qmp fd:N",
        f"run {machine} --mem-prealloc --incoming defer --serial null --name destination --qmp fd:N",
    ]


def test_of_a_measurement_of_what_was_never_touched(started: list[str]) -> None:
    measure("sterna", "idle-zero", MachineConfig(kernel="/image", dirty_log="manual"))
    machine = "--machine virt --smp 1 --memory 134217728B --accel emulated --dirty-log manual"
    assert started == [
        f"run {machine} --kernel /image --append '' --serial null --name source --qmp fd:N",
        f"run {machine} --incoming defer --serial null --name destination --qmp fd:N",
    ]


def test_of_a_measurement_of_qemu(started: list[str]) -> None:
    measure("qemu", "dirty-1g", MachineConfig(kernel="/image", append="100 10 5", smp=2))
    machine = "-M virt -cpu cortex-a15 -smp 2 -m 131072K"
    assert started == [
        f"{machine} -kernel /image -append '100 10 5' -serial null -name 'QEMU source' {QMP}",
        f"{machine} -mem-prealloc -incoming defer -serial null -name 'QEMU destination' {QMP}",
    ]


@pytest.mark.parametrize(
    ("options", "make", "expected"),
    [
        (
            KindOptions(),
            lambda kind: kind.source("A", HOST, SETTINGS),
            f"--machine virt --smp 2 {MACHINE} --kernel dirtyram --append '100 10 5' --name A {CONSOLE}",
        ),
        (
            MORE,
            lambda kind: kind.source("A", HOST, NET, NIC),
            f"--machine virt --smp 1 {MACHINE} {CARD} --dirty-log manual "
            f"--kernel net --append 10.0.9.1 --name A {CONSOLE}",
        ),
        (
            KindOptions(breakage="forget-mark"),
            lambda kind: kind.destination("B", HOST, SETTINGS, 0, hold=False),
            "--machine virt --smp 2 --memory 16777216B --accel broken:forget-mark --dirty-log bitmap "
            f"--incoming tcp:10.0.0.1:0 --name B {CONSOLE}",
        ),
        (
            MORE,
            lambda kind: kind.destination("B", HOST, SETTINGS, 7000, hold=True, log="/tmp/log", nic=NIC),
            f"--machine virt --smp 2 {MACHINE} {CARD} --dirty-log manual "
            "--incoming tcp:10.0.0.1:7000 --paused --serial file:/tmp/log --name B",
        ),
    ],
)
def test_of_a_test_bed_of_sternas(
    started: list[str], options: KindOptions, make: Callable[[VmKind], VmProcess], expected: str
) -> None:
    with make(SternaKind("emulated", options)):
        assert started == [f"run {expected} --qmp fd:N"]


@pytest.mark.parametrize(
    ("options", "make", "expected"),
    [
        (
            KindOptions(),
            lambda kind: kind.source("A", HOST, SETTINGS),
            f"-m 16384K -kernel {PROGRAM} -append '100 10 5' -name A {QMP} {QEMU_CONSOLE}",
        ),
        (
            KindOptions(arguments=("-global", "x.y=z")),
            lambda kind: kind.source("A", HOST, SHARED),
            "-object memory-backend-file,id=mach-virt.ram,size=16777216,mem-path=/proc/P/fd/N,share=on "
            "-machine memory-backend=mach-virt.ram -m 16384K -global x.y=z "
            f"-kernel {PROGRAM} -append '100 10 5' -name A {QMP} {QEMU_CONSOLE}",
        ),
        (
            KindOptions(),
            lambda kind: kind.destination("B", HOST, SETTINGS, 0, hold=True, nic=NIC),
            "-netdev tap,id=net0,ifname=tap7,script=no,downscript=no "
            "-device virtio-net-device,netdev=net0,mac=52:54:00:00:00:01 -global virtio-mmio.force-legacy=false "
            f"-m 16384K -incoming tcp:10.0.0.1:0 -S -name B {QMP} {QEMU_CONSOLE}",
        ),
    ],
)
def test_of_a_test_bed_of_qemus(
    started: list[str], options: KindOptions, make: Callable[[VmKind], VmProcess], expected: str
) -> None:
    kind = QemuKind(options)
    kind._qemu = Qemu("/usr/bin/qemu-system-arm", "9.0.0")
    with make(kind):
        assert started == [f"-M virt -cpu cortex-a15 -smp 2 {expected}"]


def test_of_a_test_bed_of_older_qemus(started: list[str]) -> None:
    kind = QemuKind(KindOptions())
    kind._qemu = Qemu("/usr/bin/qemu-system-arm", "8.2.0")
    kind.check()
    with kind.destination("B", HOST, SETTINGS, 0, hold=False, log="/tmp/log"):
        assert started == [
            f"-M virt -cpu cortex-a15 -smp 2 -m 16392K -incoming tcp:10.0.0.1:0 -serial file:/tmp/log -name B {QMP}"
        ]


@pytest.mark.parametrize(
    "config",
    [
        MachineConfig(kernel="clock"),
        MachineConfig(
            kernel="net", append="10.0.9.1 10", nics=(NicConfig("tap1"), NicConfig(fd=5)), paused=True
        ),
        MachineConfig(kernel="clock", nics=(NicConfig("tap1"),), devices=("virtio-rng", "virtio-rng")),
        MachineConfig(kernel="clock", machine="vexpress-a15", uuid=UUID(int=7), preallocated=True),
        MachineConfig(kernel="clock", accel="kvm", dirty_log="ring", smp=3, memory_bytes=(16 << 20) + 4096),
    ],
)
def test_a_machines_settings_arrive_whole(config: MachineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[MachineConfig] = []
    monkeypatch.setattr(run, "_run", lambda config, *_: arrived.append(config))
    run.command.main(sterna_arguments(config, serial="null"), standalone_mode=False)
    assert arrived == [config]


def test_a_virtio_device_is_qemus_of_the_same_name() -> None:
    line = qemu_arguments(MachineConfig(kernel="/image", devices=("virtio-rng",)))
    assert "-device virtio-rng-device -global virtio-mmio.force-legacy=false" in " ".join(line)
