"""An emulated arm64 host with the kernel's own KVM: Debian's kernel and Python under QEMU, sterna's sources inside."""
