import pytest

from sterna.testing.conformance.plugin import guest, make_guest, pytest_generate_tests, to_compare

__all__ = ["guest", "make_guest", "pytest_generate_tests", "to_compare"]

_SLOW = (
    "test_6dbf79e7_whoever_finds_a_page_protected_already_flushes_too",
    "test_e88643ba_bits_set_during_a_harvest_are_kept",
    "test_kicked_again_and_again",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name.startswith(_SLOW):
            item.add_marker("slow")
