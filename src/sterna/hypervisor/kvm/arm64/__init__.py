"""KVM on arm64: guests of AArch64, and of AArch32 where the CPUs have it."""
