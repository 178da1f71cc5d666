"""Virtio devices that a machine can have by name: a module each, which has as `DEVICE` what makes one."""
