"""numba, told where compiled code is kept: to be imported before the first function is compiled."""

import numba

from sterna.memory.kernelcache import kernel_directory

__all__ = ["numba"]

numba.config.CACHE_DIR = str(kernel_directory())
