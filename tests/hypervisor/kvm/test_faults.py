"""What goes wrong is told: by which call, with which arguments, at which address."""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import sterna
from sterna.hypervisor.interface import (
    DirtyLogMode,
    ExitReason,
    HypervisorError,
    ManualProtect,
    MemorySlot,
    SystemEvent,
    Unsupported,
)
from sterna.hypervisor.kvm.ioctl import KvmError
from sterna.hypervisor.kvm.run import ExitCode
from sterna.hypervisor.kvm.system import GET_VCPU_MMAP_SIZE, Capability, System
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.memory.bitmap import new_bitmap
from sterna.testing.conformance.backends import CODE, RAM, STOP, Program
from sterna.testing.conformance.guest import WORK, wait_until

PATHS = {"PYTHONPATH": str(Path(sterna.__file__).parent.parent)}
"""For Python in a process of its own."""


def test_no_device():
    with pytest.raises(Unsupported, match=r"cannot open /dev/kvm-not: No such file .*module kvm"):
        System("/dev/kvm-not")


def test_a_device_that_is_not_ours_to_open(kvm):
    """Another user, in a process of its own."""
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    os_stat = os.stat("/dev/kvm")
    if os_stat.st_mode & 0o006:
        pytest.skip("/dev/kvm is open to everybody")
    code = (
        "import os; from sterna.hypervisor.kvm.system import System; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: System()\n"
        "except Exception as error: print(error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | PATHS
    )
    assert "Permission denied (add yourself to the group kvm)" in said.stdout


def test_a_device_that_is_not_kvm():
    with pytest.raises(HypervisorError, match=r"/dev/null is not KVM: KVM_GET_API_VERSION\(0\)"):
        System("/dev/null")


def test_capabilities_that_are_missing_are_named(kvm):
    with System() as system:
        absent = [capability for capability in Capability if not system.check(capability)]
        if not absent:
            pytest.skip("this kernel has all that is known")
        with pytest.raises(HypervisorError, match=f"lacks .*KVM_CAP_{absent[0].name}"):
            system.require([Capability.USER_MEMORY, *absent])
        system.require([Capability.USER_MEMORY])


def test_a_closed_descriptor_is_an_error_not_a_crash(kvm):
    system = System()
    system.close()
    system.close()
    with pytest.raises(KvmError, match=r"KVM_GET_VCPU_MMAP_SIZE\(0\): Bad file descriptor \(EBADF\)"):
        system.call(GET_VCPU_MMAP_SIZE)


def test_the_kernels_refusal_names_call_and_arguments(make_guest):
    guest = make_guest()
    slot = MemorySlot(0x7FFF, Ipa(0xC000_0000), PAGE_SIZE, guest.block)
    with pytest.raises(KvmError, match=r"KVM_SET_USER_MEMORY_REGION\(slot=0x7fff, .*size=0x1000.*EINVAL"):
        guest.vm.set_memory_slot(slot)
    with pytest.raises(HypervisorError, match="there is none"):
        guest.vm.get_dirty_log(0x7FFF)


def test_a_log_that_is_off(make_guest):
    guest = make_guest(DirtyLogMode.MANUAL)
    with pytest.raises(HypervisorError, match=r"KVM_GET_DIRTY_LOG\(slot=1.*the slot's dirty log is off"):
        guest.vm.get_dirty_log(1)
    with pytest.raises(HypervisorError, match=r"KVM_CLEAR_DIRTY_LOG\(slot=1.*the slot's dirty log is off"):
        guest.vm.clear_dirty_log(1, 0, 64, new_bitmap(64))
    with pytest.raises(HypervisorError, match="needs ENABLE"):
        guest.vm.enable_manual_protect(ManualProtect.INITIALLY_SET)


def test_clear_without_manual_protect(make_guest):
    guest = make_guest()
    guest.log()
    with pytest.raises(HypervisorError, match="manual protect"):
        guest.vm.clear_dirty_log(1, 0, 64, new_bitmap(64))


def test_numbers_of_vcpus_that_cannot_be(x86):
    for smp in (0, 1 << 20):
        with pytest.raises(Unsupported, match=f"{smp} vCPUs: this host's KVM has 1 to"):
            x86.make_vm(smp, DirtyLogMode.BITMAP)


def test_nothing_stays_open(x86):
    before = len(os.listdir("/proc/self/fd"))
    for mode in DirtyLogMode:
        vm = x86.make_vm(2, mode)
        vm.create_vcpu(0)
        vm.statistics()
        vm.create_vcpu(1)
        vm.statistics()
        vm.close()
        vm.close()
    with pytest.raises(HypervisorError):
        x86.make_vm(1, DirtyLogMode.RING, ring_entries=3)
    assert len(os.listdir("/proc/self/fd")) == before


def run_code(guest, code, *parameters):
    """Run these instructions to the exit that they cause."""
    guest.write(CODE, bytes.fromhex(code))
    guest.backend.begin(guest.cpus[0], CODE, parameters)
    return guest.cpus[0].run()


def test_an_exception_ends_in_a_report(make_guest):
    leaving = run_code(make_guest(), "90 90 0f0b")  # nop; nop; ud2
    assert leaving.reason is ExitReason.SHUTDOWN
    assert leaving.detail == f"vCPU 0: the CPU shut down (triple fault), rip {CODE + 2:#x}"


@pytest.mark.parametrize("code", ["8b07", "8907"], ids=["load", "store"])  # mov eax, [rdi]; mov [rdi], eax
def test_an_access_to_nothing_is_reported(make_guest, code):
    leaving = run_code(make_guest(), code, 0x2000_0000)
    assert leaving.reason is ExitReason.INTERNAL_ERROR
    assert "access outside memory at IPA 0x20000000, rip 0x4000800" in leaving.detail


def test_code_from_nowhere_is_reported(make_guest):
    leaving = run_code(make_guest(), "ffe7", 0x2000_0000)  # jmp rdi
    assert leaving.reason in (ExitReason.INTERNAL_ERROR, ExitReason.SHUTDOWN)
    assert "rip 0x20000000" in leaving.detail


def test_memory_that_the_host_cannot_give(make_guest):
    guest = make_guest()
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert mprotect(guest.block.hva, guest.block.size, 0) == 0
    try:
        guest.start(Program.TOUCH, WORK, 1, 1)
        leaving = guest.join()
    finally:
        mprotect(guest.block.hva, guest.block.size, mmap.PROT_READ | mmap.PROT_WRITE)
    assert leaving.reason is ExitReason.INTERNAL_ERROR
    assert "memory of the guest cannot be had from the host (EFAULT)" in leaving.detail
    assert "rip 0x40008000" in leaving.detail


def exit_as(cpu, code):
    """What the vCPU makes of an exit that this host's CPU does not take for us."""
    cpu.shared.exit_reason = code
    return cpu._handle_exit()


def test_exits_that_cannot_be_provoked(make_guest):
    guest = make_guest()
    cpu = guest.cpus[0]
    guest.backend.begin(cpu, CODE, ())
    shared = cpu.shared
    shared.fail_entry.hardware_entry_failure_reason = 0x8000_0021
    leaving = exit_as(cpu, ExitCode.FAIL_ENTRY)
    assert leaving.reason is ExitReason.FAIL_ENTRY
    assert leaving.detail == "vCPU 0: the hardware refused its state, reason 0x80000021, rip 0x40008000"
    shared.internal.suberror, shared.internal.ndata = 1, 2
    shared.internal.data[0], shared.internal.data[1] = 0x10, 0xF4
    leaving = exit_as(cpu, ExitCode.INTERNAL_ERROR)
    assert leaving.reason is ExitReason.INTERNAL_ERROR
    assert (
        "an instruction that it had to emulate and cannot (data 0x10 0xf4), rip 0x40008000" in leaving.detail
    )
    shared.internal.suberror, shared.internal.ndata = 77, 1 << 31
    assert "suberror 77" in exit_as(cpu, ExitCode.INTERNAL_ERROR).detail
    shared.system_event.type = 2
    assert exit_as(cpu, ExitCode.SYSTEM_EVENT).event is SystemEvent.RESET
    shared.system_event.type = 99
    assert "system event 99" in exit_as(cpu, ExitCode.SYSTEM_EVENT).detail
    shared.io.direction, shared.io.size, shared.io.port = 1, 4, 0x80
    assert "4-byte access to port 0x80, where nothing is" in exit_as(cpu, ExitCode.IO).detail
    assert "KVM_EXIT_HLT, which no guest" in exit_as(cpu, ExitCode.HLT).detail
    assert "exit 4711, which no guest" in exit_as(cpu, 4711).detail
    assert exit_as(cpu, ExitCode.INTR) is None


def test_a_foreign_signal_does_not_end_run(make_guest):
    """EINTR in KVM_RUN without a kick: the vCPU goes on."""
    guest = make_guest()
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signal handlers are made on the main thread only")
    seen = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.set())
    try:
        guest.start(Program.SWEEP, WORK, 50, 0)
        wait_until(lambda: guest.words[49] != 0, "a sweep")
        for _ in range(20):
            signal.pthread_kill(guest._threads[0].ident, signal.SIGUSR1)
        wait_until(seen.is_set, "the signal's handler")
        value = int(guest.words[49])
        wait_until(lambda: guest.words[49] != value, "another sweep")
    finally:
        signal.signal(signal.SIGUSR1, before)
    guest.stop()


def test_ioctls_are_made_again_when_a_signal_interrupts_them(make_guest):
    """Harvests on a thread that gets one signal after the other."""
    guest = make_guest(DirtyLogMode.MANUAL)
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signal handlers are made on the main thread only")
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        guest.log()
        for value in range(1, 20):
            guest.touch(0, 300, value=value)
            assert guest.harvest() == list(range(300))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_kick_while_an_access_is_finished_is_not_lost(make_guest, monkeypatch):
    guest = make_guest()
    cpu = guest.cpus[0]
    assert "access outside memory" in run_code(guest, "8b07", 0x2000_0000).detail  # mov eax, [rdi]
    attempt = cpu.fd.attempt

    def kick_and_attempt(*arguments):
        cpu.kick()
        return attempt(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cpu.fd, "attempt", kick_and_attempt)
        cpu.finish_access()
    assert cpu.shared.immediate_exit
    assert cpu.run().reason is ExitReason.INTR


def test_the_threads_signal_mask_is_left_alone(make_guest):
    guest = make_guest()
    masks = []

    def run():
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        guest.cpus[0].run()
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        masks.append(signal.sigpending())

    guest.backend.begin(guest.cpus[0], CODE, ())
    guest.write(CODE, guest.backend.code(Program.SPIN))
    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: guest.cpus[0]._in_guest, "guest mode")
    for _ in range(10):
        guest.cpus[0].kick()
    thread.join()
    assert masks[0] == masks[1]
    assert not masks[2]


def test_a_device_that_fails_is_the_callers_to_know(make_guest):
    guest = make_guest()

    class Broken:
        def mmio_read(self, offset, size, cpu):
            raise ValueError("broken")

        def mmio_write(self, offset, size, value, cpu):
            raise ValueError("broken")

    guest.vm.add_mmio(Ipa(0x0B00_0000), PAGE_SIZE, Broken())
    with pytest.raises(ValueError, match="broken"):
        run_code(guest, "8b07", 0x0B00_0000)


def test_devices_where_there_is_no_room(make_guest):
    guest = make_guest()
    for ipa, size, message in ((STOP, PAGE_SIZE, "overlaps a device"), (RAM, PAGE_SIZE, "overlaps memory slot 0"),
                               (Ipa(0x0B00_0001), PAGE_SIZE, "page aligned"), (Ipa(1 << 32), PAGE_SIZE, "4 GiB")):  # fmt: skip
        with pytest.raises(HypervisorError, match=message):
            guest.vm.add_mmio(ipa, size, None)
