"""Guest RAM in a VM: the memory slot, its dirty log, and the host's own accesses."""

from sterna.hypervisor.interface import HostPaging, HypervisorError, MemorySlot, SlotFlags, Vm
from sterna.machine.errors import MachineError
from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE, Ipa
from sterna.memory.bitmap import DirtyBatch, Words, widen
from sterna.memory.ram import RamBlock

_SLOT = 0


class AddressError(MachineError, ValueError):
    """An access that is not to guest RAM; the text names the range."""


class GuestRam:
    """One RAM block, put into a VM as a memory slot. Pages of its dirty log, whatever their size, become migration's here.

    :ivar block: the memory, whole pages of the log
    :ivar logging: whether writes are logged

    :param initially_set: the VM's logs start with all pages dirty
    """

    def __init__(self, vm: Vm, block: RamBlock, base: Ipa, *, initially_set: bool = False) -> None:
        self.block = block
        self._initially_set = initially_set
        self.logging = False
        self._vm = vm
        self._base = base
        self._log_page_bits = vm.log_page_bits
        self._set_slot(SlotFlags.NONE)

    def _set_slot(self, flags: SlotFlags) -> None:
        self._vm.set_memory_slot(MemorySlot(_SLOT, self._base, self.block.size, self.block, flags=flags))

    def start_logging(self) -> None:
        """Log writes from now on. Does nothing when they are logged already."""
        if not self.logging:
            self._set_slot(SlotFlags.LOG_DIRTY_PAGES)
            if self._initially_set:
                # A log that starts full says nothing: taken once, its pages are protected.
                self._vm.harvest_dirty_log(_SLOT)
            self.logging = True

    def stop_logging(self) -> None:
        """Stop logging. Does nothing when it is off. No vCPU runs meanwhile."""
        if not self.logging:
            return
        # Pages that are writable now would stay in 4 KiB entries for good: no fault would come to rebuild their block. Taken
        # from the log once more, all are write-protected, and the next write to each block makes it whole again.
        self._vm.harvest_dirty_log(_SLOT)
        self._set_slot(SlotFlags.NONE)
        self.logging = False

    def harvest(self) -> DirtyBatch:
        """Take the dirty log, and protect its pages again.

        :raise HypervisorError: When writes are not logged.
        """
        return self._batch(self._vm.harvest_dirty_log(_SLOT))

    def peek(self) -> DirtyBatch:
        """What the dirty log holds now, and the next harvest will have.

        :raise HypervisorError: When writes are not logged.
        """
        return self._batch(self._vm.peek_dirty_log(_SLOT))

    def _batch(self, words: Words) -> DirtyBatch:
        factor = 1 << self._log_page_bits - PAGE_SHIFT
        return DirtyBatch(self.block.name, widen(words, factor, self.block.size >> PAGE_SHIFT))

    def locate(self, page: int) -> tuple[int, int]:
        """The slot that has a page of the block, and where the guest has it."""
        return _SLOT, self._base + (page << PAGE_SHIFT)

    def read(self, ipa: int, size: int) -> bytes:
        """Bytes of guest RAM.

        :raise AddressError: When the range is not within RAM.
        """
        at = self._offset(ipa, size)
        return bytes(self.block.view[at : at + size])

    def write(self, ipa: int, data: bytes | memoryview) -> None:
        """Write to guest RAM for the host, through the dirty log.

        :raise AddressError: When the range is not within RAM.
        """
        if not data:
            return
        at = self._offset(ipa, len(data))
        self.block.view[at : at + len(data)] = data
        first, last = at >> self._log_page_bits, at + len(data) - 1 >> self._log_page_bits
        self._vm.mark_dirty(_SLOT, first, last - first + 1)

    def unmap(self, ipa: int, size: int) -> None:
        """Take the mappings of a range of pages away; the guest faults them in again.

        :raise AddressError: When the range is not whole pages within RAM.
        :raise HypervisorError: When the host's kernel alone does so.
        """
        self._host_paging(ipa, size).unmap_range(Ipa(ipa), size)

    def age(self, ipa: int, size: int) -> int:
        """Clear the access flags of a range of pages: how many mappings had them set.

        :raise AddressError: When the range is not whole pages within RAM.
        :raise HypervisorError: When the host's kernel alone does so.
        """
        return self._host_paging(ipa, size).age_range(Ipa(ipa), size)

    def _host_paging(self, ipa: int, size: int) -> HostPaging:
        self._offset(ipa, size)
        if ipa % PAGE_SIZE or size % PAGE_SIZE:
            raise AddressError(f"{size} bytes at {ipa:#x} are not whole pages")
        if not isinstance(self._vm, HostPaging):
            raise HypervisorError("here only the host's kernel unmaps and ages guest memory")
        return self._vm

    def _offset(self, ipa: int, size: int) -> int:
        at = ipa - self._base
        if size < 0 or at < 0 or at + size > self.block.size:
            raise AddressError(
                f"{size} bytes at {ipa:#x} are not in RAM, which is {self._base:#x} to "
                f"{self._base + self.block.size:#x} ({self.block.size // PAGE_SIZE} pages)"
            )
        return at
