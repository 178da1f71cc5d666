"""The C library's heap, in a process that lives long and starts many threads."""

import ctypes

_M_ARENA_MAX = -8  # malloc.h of glibc


def share_heap() -> None:
    """Have all threads that start from now on allocate from one heap.

    glibc gives threads heaps of their own (mallopt(3), M_ARENA_MAX), and what is free in one is of no use to the others. A
    migration's threads come and go, each with buffers of other sizes, and a process of many migrations would grow by all that is
    free in eight heaps for each processor. They do not hinder each other on one: Python's threads allocate one at a time.
    Other C libraries have one heap anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Give the kernel what is free in the heap (malloc_trim(3)): glibc by itself gives back only what is at its end, and so keeps
    the most that was ever in use at once. It takes some milliseconds.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
