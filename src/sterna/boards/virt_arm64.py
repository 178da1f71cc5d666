"""QEMU's `virt` with AArch64 CPUs; QEMU has one name for both."""

from dataclasses import replace

from sterna.boards.virt import BOARD as VIRT

BOARD = replace(VIRT, name="virt-arm64", arch="arm64")
