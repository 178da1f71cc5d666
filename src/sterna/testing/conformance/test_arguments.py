"""Numbers and bitmaps that no hypervisor takes, refused by all of them in the same words, before anything is changed."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import pytest

from sterna.hypervisor.interface import (
    ArgumentError,
    DirtyLogMode,
    HostPaging,
    HypervisorError,
    ManualProtect,
    MemorySlot,
    SlotFlags,
)
from sterna.memory.address import PAGE_SIZE, Ipa, bitmap_words
from sterna.memory.bitmap import full_bitmap
from sterna.testing.conformance.guest import WORK, WORK_PAGES, ConformanceGuest, MakeGuest, Variant

F = TypeVar("F", bound=Callable[..., None])
NO_NUMBERS: dict[str, tuple[Any, str]] = {
    "negative": (-1, "-1 is not in 0 to"),
    "beyond 64 bits": (1 << 64, f"{1 << 64} is not in 0 to"),
    "far beyond": (1 << 5000, "a number of 5001 bits is not in 0 to"),
    "float": (1.0, "1.0 is not an integer"),
    "bool": (True, "True is not an integer"),
    "text": ("1", "'1' is not an integer"),
    "none": (None, "None is not an integer"),
    "numpy, negative": (np.int64(-1), "-1 is not in 0 to"),
    "array": (np.arange(2), r"array\(\[0, 1\]\) is not an integer"),
}
BEYOND_32_BITS = {"beyond 32 bits": ((1 << 32) + 1, f"{(1 << 32) + 1} is not in 0 to 32767")}


def each(cases: Mapping[str, tuple[Any, str]]) -> Callable[[F], F]:
    return pytest.mark.parametrize(("number", "message"), cases.values(), ids=cases)


@each(NO_NUMBERS | BEYOND_32_BITS)
def test_slot_numbers(guest: ConformanceGuest, number: Any, message: str) -> None:
    vm = guest.vm
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: vm.get_dirty_log(number),
        "harvest": lambda: vm.harvest_dirty_log(number),
        "peek": lambda: vm.peek_dirty_log(number),
        "mark": lambda: vm.mark_dirty(number, 0, 1),
        "clear": lambda: vm.clear_dirty_log(number, 0, 64, full_bitmap(64)),
        "delete": lambda: vm.set_memory_slot(MemorySlot(number, WORK, 0, guest.block)),
        "create": lambda: vm.set_memory_slot(MemorySlot(number, Ipa(0x9000_0000), PAGE_SIZE, guest.block)),
    }
    for call in calls.values():
        with pytest.raises(ArgumentError, match=f"memory slot: {message}"):
            call()
    guest.log()
    guest.touch(0, 3)
    assert guest.harvest() == [0, 1, 2], "the slot is as it was"


@each(NO_NUMBERS)
@pytest.mark.parametrize("field", ["ipa", "size", "offset"])
def test_a_slots_addresses(guest: ConformanceGuest, field: str, number: Any, message: str) -> None:
    fields: dict[str, Any] = {
        "slot": 5,
        "ipa": Ipa(0x9000_0000),
        "size": PAGE_SIZE,
        "block": guest.block,
        "offset": 0,
    }
    with pytest.raises(ArgumentError, match=f"memory slot 5: {field}: {message}"):
        guest.vm.set_memory_slot(MemorySlot(**fields | {field: number}))
    guest.vm.set_memory_slot(MemorySlot(**fields))


@pytest.mark.parametrize("flags", [4, -1, 1 << 32, None])
def test_a_slots_flags(guest: ConformanceGuest, flags: Any) -> None:
    with pytest.raises(ArgumentError, match="memory slot 1: flags: "):
        guest.set_slot(flags=flags)


def test_a_slots_numbers_may_be_numpys(guest: ConformanceGuest) -> None:
    numbers: dict[str, Any] = {
        "slot": np.int64(5),
        "ipa": np.uint64(0x9000_0000),
        "size": np.int32(PAGE_SIZE),
    }
    guest.vm.set_memory_slot(MemorySlot(**numbers, block=guest.block, flags=SlotFlags.LOG_DIRTY_PAGES))
    five: Any = np.uint8(5)
    assert guest.vm.harvest_dirty_log(five).size == 1


@each(NO_NUMBERS)
def test_ranges_of_pages(guest: ConformanceGuest, number: Any, message: str) -> None:
    guest.log()
    for first, pages, which in ((number, 64, "first page"), (0, number, "number of pages")):
        with pytest.raises(ArgumentError, match=f"memory slot 1: {which}: {message}"):
            guest.vm.mark_dirty(1, first, pages)
        with pytest.raises(ArgumentError, match=f"memory slot 1: {which}: {message}"):
            guest.vm.clear_dirty_log(1, first, pages, full_bitmap(64))
    assert guest.harvest() == []


@pytest.mark.parametrize(
    ("first", "pages"), [(0, WORK_PAGES + 1), (WORK_PAGES, 1), (WORK_PAGES + 64, 0), (1, (1 << 64) - 1)]
)
def test_ranges_beyond_the_slot(guest: ConformanceGuest, first: int, pages: int) -> None:
    guest.log()
    with pytest.raises(ArgumentError, match=f"are not all in the slot's {WORK_PAGES}"):
        guest.vm.mark_dirty(1, first, pages)
    with pytest.raises(ArgumentError, match=f"are not all in the slot's {WORK_PAGES}"):
        guest.vm.clear_dirty_log(1, first, pages, full_bitmap(64))
    assert guest.harvest() == []


NO_BITMAPS = {
    "list": ([1] * 64, "an array of numpy's, not a list"),
    "none": (None, "an array of numpy's, not a NoneType"),
    "signed": (full_bitmap(4096).astype(np.int64), "of type uint64, not int64"),
    "narrow": (full_bitmap(4096).view(np.uint8), "of type uint64, not uint8"),
    "foreign byte order": (full_bitmap(4096).astype(">u8"), "of type uint64, not >u8"),
    "float": (np.ones(64), "of type uint64, not float64"),
    "short": (full_bitmap(4096 - 64), "of 63 words is not one of 4096 pages, 64 words"),
    "long": (full_bitmap(4096 + 64), "of 65 words is not one of 4096 pages, 64 words"),
    "empty": (full_bitmap(0), "of 0 words is not one of 4096 pages, 64 words"),
    "two dimensions": (full_bitmap(4096).reshape(8, 8), "one dimension, not 2"),
    "not contiguous": (full_bitmap(8192)[::2], "one after the other, not 16 bytes apart"),
    "backwards": (full_bitmap(4096)[::-1], "one after the other, not -8 bytes apart"),
}


@pytest.mark.parametrize(("words", "message"), NO_BITMAPS.values(), ids=NO_BITMAPS)
def test_bitmaps(guest: ConformanceGuest, words: Any, message: str) -> None:
    guest.log()
    guest.touch(0, 3)
    with pytest.raises(ArgumentError, match=f"memory slot 1: a bitmap.*{message}"):
        guest.vm.clear_dirty_log(1, 0, 4096, words)
    assert guest.harvest() == [0, 1, 2], "nothing was cleared"


def test_a_bitmap_is_not_changed_and_its_last_bits_are_left_out(
    make_guest: MakeGuest, variant: Variant
) -> None:
    if variant[1] is not DirtyLogMode.MANUAL:
        return
    guest = make_guest(pages=64 + 3)
    guest.log()
    guest.touch(64, 3)
    words = np.full(bitmap_words(3), np.iinfo(np.uint64).max, dtype=np.uint64)
    words.flags.writeable = False
    guest.vm.clear_dirty_log(1, 64, 3, words)
    assert guest.harvest() == []


@each(NO_NUMBERS | {"far from the next": (np.int64(1 << 40), r"the next of 1 vCPUs has index 1")})
def test_numbers_of_new_vcpus(guest: ConformanceGuest, number: Any, message: str) -> None:
    with pytest.raises(HypervisorError, match=f"vCPU.*{message}"):
        guest.vm.create_vcpu(number)


@each(NO_NUMBERS)
def test_numbers_of_vcpus(make_guest: MakeGuest, variant: Variant, number: Any, message: str) -> None:
    backend, mode = variant
    make_guest()  # where there is no such hypervisor the test is skipped
    with pytest.raises(HypervisorError, match=message.split(" is ")[1]):
        backend.make_vm(number, mode)


@each(NO_NUMBERS)
def test_a_devices_place(guest: ConformanceGuest, number: Any, message: str) -> None:
    no_device: Any = None
    ipa: Any
    for ipa, size, what in ((number, PAGE_SIZE, "address"), (0x0B00_0000, number, "size")):
        with pytest.raises(ArgumentError, match=f"a device's {what}: {message}"):
            guest.vm.add_mmio(ipa, size, no_device)


@each(NO_NUMBERS)
def test_the_counter(guest: ConformanceGuest, number: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"counter: {message}"):
        guest.vm.set_counter(number)


@each(
    NO_NUMBERS | {"not a page": (PAGE_SIZE + 1, "not whole pages"), "outside": (1 << 60, "not whole pages")}
)
def test_what_the_host_takes_away(guest: ConformanceGuest, number: Any, message: str) -> None:
    if not isinstance(guest.vm, HostPaging):
        return
    for ipa, size in ((number, PAGE_SIZE), (WORK, number)):
        for call in (guest.vm.unmap_range, guest.vm.age_range):
            with pytest.raises(ArgumentError, match=message):
                call(ipa, size)


@pytest.mark.parametrize("flags", [4, -1, 1 << 64, 1.0, None, ManualProtect.INITIALLY_SET])
def test_kinds_of_manual_protect(guest: ConformanceGuest, flags: Any) -> None:
    with pytest.raises(ArgumentError, match=r"manual protect: |INITIALLY_SET needs ENABLE"):
        guest.vm.enable_manual_protect(flags)
