"""What each part of a machine saves, in the layout of QEMU 7.2's sections."""
