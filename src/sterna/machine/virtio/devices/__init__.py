"""Virtio devices that a machine can have by name: a module each, which has as `DEVICE` what makes one.

It is a `VirtioDevice` of a `Kind`; `virtio_rng.py` is the shortest. The network card is not here: it is asked for by `--nic`.
"""
