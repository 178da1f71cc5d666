"""Compiled kernels: functions on numpy arrays that become machine code, once, kept on disk and loaded without a compiler.

`kernel.py` is what modules with kernels import; atomic operations for them are in `atomics.py`.
"""
