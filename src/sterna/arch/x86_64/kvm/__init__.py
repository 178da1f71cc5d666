"""What x86 adds to KVM: its registers, CPUID, the VM's clock, port I/O."""
