"""Machine code in this process, and how Python calls it."""

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from sterna.jit.source import KernelError, Key

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
_EXCEPTION = ctypes.byref(ctypes.c_void_p())
"""Where descriptions of exceptions go. Nobody reads them: they stand in numba's terms."""


class ArrayHead(ctypes.Structure):
    """What compiled code reads of an array: PyArrayObject_fields (numpy/ndarraytypes.h), behind the head of all objects."""

    _fields_ = (
        ("references", ctypes.c_ssize_t),
        ("type", ctypes.c_size_t),
        ("data", ctypes.c_size_t),
        ("ndim", ctypes.c_int),
        ("shape", ctypes.c_size_t),
        ("strides", ctypes.c_size_t),
        ("base", ctypes.c_size_t),
        ("dtype", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


def _head_is_known() -> bool:
    """Whether this Python's and this numpy's arrays begin like `ArrayHead`."""
    if object.__basicsize__ != ArrayHead.data.offset:
        return False
    probe = np.zeros((3, 5), dtype=np.uint32)[1:, ::2]
    head = ArrayHead.from_address(id(probe))
    known = (id(np.ndarray), probe.ctypes.data, probe.ndim, id(probe.dtype), probe.flags.num)
    if (head.type, head.data, head.ndim, head.dtype, head.flags) != known:
        return False
    sizes = ctypes.c_ssize_t * probe.ndim
    found = (tuple(sizes.from_address(head.shape)), tuple(sizes.from_address(head.strides)))
    return found == (probe.shape, probe.strides)


_HEAD_IS_KNOWN = _head_is_known()
MISFIT = -1000
"""What the entry of a kernel returns for arrays that are not as its key says; numba's own status numbers are small."""


class Code:
    """Machine code of a kernel, for one `Key`.

    :ivar address: of its function, of numba's native calling convention: where the result goes, where an exception's
        description goes, and the arguments one after the other, an array as what manages its memory (twice nothing), number of
        items, their size, address, shape and strides. Each takes one register or one place on the stack (System V AMD64 ABI
        3.2.3; AAPCS64 6.8.2)
    :param returns: the result: ``i``, ``u`` and ``b`` are int64, uint64 and bool, several a tuple, none None
    :param entry: the address of a function that takes arrays as they are, so that Python need not take them apart: where the
        result goes, the addresses of the type of arrays and of each array's dtype, and the arguments; it returns `MISFIT` when
        an array is another than the key says. 0: there is none
    """

    def __init__(self, name: str, address: int, returns: str, key: Key, entry: int = 0) -> None:
        self.address = address
        self._name = name
        self._returns = returns
        pointer, word = ctypes.c_void_p, ctypes.c_int64
        arrays = [part for part in key if isinstance(part, tuple)]
        words = len(key) + sum(4 + 2 * ndim for _, ndim, _ in arrays)
        self._call = ctypes.CFUNCTYPE(ctypes.c_int32, pointer, pointer, *[word] * words)(address)
        self._result = (ctypes.c_uint64 if returns == "u" else word) * max(len(returns), 1)
        self._enter = None
        if entry and _HEAD_IS_KNOWN:
            kinds = [ctypes.py_object if isinstance(part, tuple) else word for part in key]
            self._enter = ctypes.CFUNCTYPE(ctypes.c_int32, pointer, pointer, *kinds)(entry)
            self._plain = tuple((at, part) for at, part in enumerate(key) if not isinstance(part, tuple))
            self._known = (ctypes.c_size_t * (1 + len(arrays)))(
                id(np.ndarray), *(id(dtype) for dtype, _, _ in arrays)
            )
            self._dtypes = [dtype for dtype, _, _ in arrays]  # What has an address must stay.

    def enter(self, arguments: tuple[Any, ...]) -> Any:
        """Run it by its entry; NotImplemented when there is none, or arguments are others than the key says."""
        if self._enter is None:
            return NotImplemented
        for at, kind in self._plain:
            argument = arguments[at]
            if type(argument) is not kind or not INT64_MIN <= argument <= INT64_MAX:
                return NotImplemented
        result = self._result()
        status = self._enter(result, self._known, *arguments)
        return NotImplemented if status == MISFIT else self._returned(status, result)

    def __call__(self, words: Iterable[int]) -> Any:
        """Run it with arguments that are taken apart."""
        result = self._result()
        return self._returned(self._call(result, _EXCEPTION, *words), result)

    def _returned(self, status: int, result: Any) -> Any:
        if status != 0:
            raise KernelError(f"the kernel {self._name} failed with status {status}")
        if not self._returns:
            return None
        if self._returns == "b":
            return bool(result[0] & 0xFF)
        return result[0] if len(self._returns) == 1 else tuple(result)
