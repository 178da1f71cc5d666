"""Virtio devices, and the memory-mapped transports that they are behind."""
