"""ARMv8 in AArch64."""

from sterna.arch.arm64.stage2 import FORMAT
from sterna.hypervisor.architecture import Architecture, Cpus

ARCHITECTURE = Architecture(
    name="arm64",
    target="aarch64",
    elf=(64, "EM_AARCH64"),
    platform="sterna.arch.arm64.platform:Arm64Platform",
    kvm_host="aarch64",
    kvm=Cpus({"host": "arm,armv8"}, "sterna.arch.arm64.kvm:Arm64KvmVm"),
    stage2=FORMAT,
)
