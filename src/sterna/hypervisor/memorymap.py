"""What is where in a VM's physical address space: memory slots and devices, and which of them may be added."""

from collections.abc import Mapping

from sterna.hypervisor.arguments import integer
from sterna.hypervisor.interface import ArgumentError, HypervisorError, MemorySlot, MmioDevice, SlotFlags
from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE, Ipa

LARGEST_SLOT = (1 << 15) - 1
"""KVM keeps slot numbers in 15 bits, and takes higher ones for other address spaces (Documentation/virt/kvm/api.rst, 4.35)."""


class MemoryMap:
    """The slots and devices of one VM. It has no lock: who changes it has one, who looks at it needs none.

    :ivar slots: by number; a change leaves this mapping as it is, for those who look at it, and puts another in its place

    :param ipa_bits: width of a guest physical address
    :param device_end: devices end below this address
    :param log_page_bits: slots are whole pages of so many bits
    """

    def __init__(self, ipa_bits: int, device_end: int = 1 << 32, *, log_page_bits: int = PAGE_SHIFT) -> None:
        self.slots: Mapping[int, MemorySlot] = {}
        self._ipa_bits = ipa_bits
        self._slot_unit = 1 << log_page_bits
        self._device_end = device_end
        self._devices: list[tuple[Ipa, int, MmioDevice]] = []

    def check_slot(self, slot: MemorySlot) -> tuple[MemorySlot, MemorySlot | None]:
        """Check a slot that is to be created or changed, or with a size of zero deleted.

        :return: the slot in Python's numbers, and what it has been until now
        :raise HypervisorError: When it overlaps another slot or a device, is not page aligned, lies outside its RAM block or the
            address space, or changes what a slot keeps for its life; when there is none to delete; when a number is none.
        """
        number = integer("memory slot", slot.slot, LARGEST_SLOT)
        name = f"memory slot {number}"
        known = SlotFlags.LOG_DIRTY_PAGES | SlotFlags.READONLY
        slot = MemorySlot(
            number,
            Ipa(integer(f"{name}: ipa", slot.ipa)),
            integer(f"{name}: size", slot.size),
            slot.block,
            integer(f"{name}: offset", slot.offset),
            SlotFlags(integer(f"{name}: flags", slot.flags, int(known))),
        )
        old = self.slots.get(slot.slot)
        if not slot.size:
            if old is None:
                raise HypervisorError(f"{name}: there is none to delete")
            return slot, old
        if (slot.ipa | slot.size | slot.offset) % self._slot_unit:
            raise HypervisorError(
                f"{name}: IPA {slot.ipa:#x}, size {slot.size:#x} and offset {slot.offset:#x} must be multiples of "
                f"{self._slot_unit}"
            )
        if slot.offset + slot.size > slot.block.size:
            raise HypervisorError(f"{name}: reaches past the end of RAM block {slot.block.name!r}")
        end = slot.ipa + slot.size
        if end > 1 << self._ipa_bits:
            raise HypervisorError(
                f"{name}: {slot.ipa:#x} to {end:#x} is outside the {self._ipa_bits}-bit IPA space"
            )
        for other in self.slots.values():
            if other.slot != slot.slot and slot.ipa < other.ipa + other.size and other.ipa < end:
                raise HypervisorError(f"{name}: overlaps memory slot {other.slot} at IPA {other.ipa:#x}")
        for ipa, size, _device in self._devices:
            if slot.ipa < ipa + size and ipa < end:
                raise HypervisorError(f"{name}: overlaps a device at IPA {ipa:#x}")
        if old is None:
            return slot, None
        if (old.size, old.block, old.offset) != (slot.size, slot.block, slot.offset):
            raise HypervisorError(f"{name}: size and RAM cannot change; delete the slot first")
        if (old.flags ^ slot.flags) & SlotFlags.READONLY:
            raise HypervisorError(f"{name}: READONLY cannot change; delete the slot first")
        return slot, old

    def slot(self, number: int) -> MemorySlot:
        """A slot by its number.

        :raise HypervisorError: When there is none.
        """
        slot = self.slots.get(integer("memory slot", number, LARGEST_SLOT))
        if slot is None:
            raise HypervisorError(f"memory slot {number}: there is none")
        return slot

    def put(self, slot: MemorySlot) -> None:
        """Add a slot that `check_slot` has let through, or put it in the place of the one with its number."""
        self.slots = {**self.slots, slot.slot: slot}

    def drop(self, number: int) -> None:
        """Forget a slot."""
        self.slots = {key: slot for key, slot in self.slots.items() if key != number}

    def slot_at(self, ipa: int, size: int) -> MemorySlot | None:
        """The slot that a range is in, whole."""
        for slot in self.slots.values():
            if slot.ipa <= ipa and ipa + size <= slot.ipa + slot.size:
                return slot
        return None

    def memory_in(self, ipa: Ipa, size: int) -> list[tuple[Ipa, int]]:
        """The parts of a range that memory slots have: address and size of each."""
        ends = [(max(ipa, slot.ipa), min(ipa + size, slot.ipa + slot.size)) for slot in self.slots.values()]
        return [(Ipa(start), end - start) for start, end in ends if start < end]

    def read(self, ipa: int, size: int) -> bytes | None:
        """Guest memory, or None when the range is not in one slot, or the slot goes meanwhile."""
        slot = self.slot_at(ipa, size)
        if slot is None:
            return None
        start = slot.offset + ipa - slot.ipa
        try:
            data = slot.block.data
        except AttributeError:
            # The block has been closed since; else its memory stays while this looks at it.
            return None
        return bytes(data[start : start + size])

    @property
    def devices(self) -> tuple[tuple[Ipa, int, MmioDevice], ...]:
        """Address, size and device of each."""
        return tuple(self._devices)

    def check_device(self, ipa: Ipa, size: int) -> tuple[Ipa, int]:
        """Check a device that is to be added.

        :return: its address and size in Python's numbers
        :raise HypervisorError: When its place is not page aligned, out of reach or taken.
        """
        ipa, size = Ipa(integer("a device's address", ipa)), integer("a device's size", size)
        if (ipa | size) % PAGE_SIZE or not size:
            raise HypervisorError(f"a device at {ipa:#x} of size {size:#x} is not page aligned")
        if ipa + size > self._device_end:
            raise HypervisorError(f"a device at {ipa:#x} of size {size:#x} is not below 4 GiB")
        taken = [(slot.ipa, slot.size, f"memory slot {slot.slot}") for slot in self.slots.values()]
        taken += [(start, length, "a device") for start, length, _device in self._devices]
        for start, length, what in taken:
            if ipa < start + length and start < ipa + size:
                raise HypervisorError(f"a device at {ipa:#x} overlaps {what} at {start:#x}")
        return ipa, size

    def check_range(self, ipa: Ipa, size: int) -> tuple[Ipa, int]:
        """Check a range of guest physical addresses.

        :return: the range in Python's numbers
        :raise HypervisorError: When it is not page aligned, or outside the address space.
        """
        ipa, size = Ipa(integer("address", ipa)), integer("size", size)
        if (ipa | size) % PAGE_SIZE or ipa + size > 1 << self._ipa_bits:
            raise ArgumentError(
                f"{size:#x} bytes at {ipa:#x}: not whole pages of the {self._ipa_bits}-bit IPA space"
            )
        return ipa, size

    def add_device(self, ipa: Ipa, size: int, device: MmioDevice) -> None:
        """Put a device where `check_device` has found room."""
        self._devices.append((ipa, size, device))

    def device_at(self, ipa: int, size: int) -> tuple[MmioDevice, int] | None:
        """The device that answers an access, and the offset in it."""
        for start, length, device in self._devices:
            if start <= ipa and ipa + size <= start + length:
                return device, ipa - start
        return None
