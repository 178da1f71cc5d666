"""Binary statistics of a VM or a vCPU (Documentation/virt/kvm/api.rst, 4.133)."""

import ctypes
import os
import struct

from sterna.hypervisor.kvm.ioctl import Descriptor, io

GET_STATS_FD = io("KVM_GET_STATS_FD", 0xCE)


class StatsHeader(ctypes.Structure):
    """struct kvm_stats_header"""

    _fields_ = (
        ("flags", ctypes.c_uint32),
        ("name_size", ctypes.c_uint32),
        ("num_desc", ctypes.c_uint32),
        ("id_offset", ctypes.c_uint32),
        ("desc_offset", ctypes.c_uint32),
        ("data_offset", ctypes.c_uint32),
    )


class StatsDescriptor(ctypes.Structure):
    """struct kvm_stats_desc"""

    _fields_ = (
        ("flags", ctypes.c_uint32),
        ("exponent", ctypes.c_int16),
        ("size", ctypes.c_uint16),
        ("offset", ctypes.c_uint32),
        ("bucket_size", ctypes.c_uint32),
    )


class Statistics(Descriptor):
    """The single numbers that the kernel counts; histograms are left out.

    :param owner: the VM or vCPU
    :raise KvmError: When the kernel has none to offer.
    """

    def __init__(self, owner: Descriptor) -> None:
        super().__init__(owner.call(GET_STATS_FD))
        header = StatsHeader.from_buffer_copy(self._read(ctypes.sizeof(StatsHeader), 0))
        size = ctypes.sizeof(StatsDescriptor) + header.name_size
        self._offsets: dict[str, int] = {}
        for number in range(header.num_desc):
            raw = self._read(size, header.desc_offset + number * size)
            descriptor = StatsDescriptor.from_buffer_copy(raw)
            name = raw[ctypes.sizeof(StatsDescriptor) :].split(b"\0")[0].decode("ascii", "replace")
            if descriptor.size == 1:
                self._offsets[name] = descriptor.offset
        self._data = header.data_offset
        self._data_bytes = 8 + max(self._offsets.values(), default=0)

    def _read(self, size: int, offset: int) -> bytes:
        data = os.pread(self.number, size, offset)
        if len(data) < size:
            raise OSError(f"KVM's statistics end at byte {offset + len(data)}")
        return data

    def read(self) -> dict[str, int]:
        """The numbers, by the kernel's names."""
        data = self._read(self._data_bytes, self._data)
        return {name: struct.unpack_from("=Q", data, offset)[0] for name, offset in self._offsets.items()}
