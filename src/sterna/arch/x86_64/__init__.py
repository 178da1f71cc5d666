"""x86_64, in long mode."""

from sterna.hypervisor.architecture import Architecture, Cpus

ARCHITECTURE = Architecture(
    name="x86_64",
    target="x86_64",
    elf=(64, "EM_X86_64"),
    platform="sterna.arch.x86_64.platform:X86Platform",
    kvm_host="x86_64",
    kvm=Cpus({"host": "x86,x86-64"}, "sterna.arch.x86_64.kvm.vm:X86KvmVm"),
)
