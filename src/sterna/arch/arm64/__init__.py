"""ARMv8 in AArch64."""
