"""ARMv7 with the Large Physical Address Extension."""

from sterna.arch.armv7.stage2 import FORMAT
from sterna.hypervisor.architecture import Architecture, Cpus

_MODELS = {"cortex-a15": "arm,cortex-a15"}

ARCHITECTURE = Architecture(
    name="armv7",
    target="arm",
    elf=(32, "EM_ARM"),
    platform="sterna.arch.armv7.platform:ArmPlatform",
    kvm_host="aarch64",
    kvm=Cpus(_MODELS, "sterna.arch.armv7.kvm:Armv7KvmVm"),
    stage2=FORMAT,
    emulated=Cpus(_MODELS, "sterna.arch.armv7.emulated:CortexA15"),
)
