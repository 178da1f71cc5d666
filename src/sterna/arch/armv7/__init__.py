"""ARMv7 with the Large Physical Address Extension."""
