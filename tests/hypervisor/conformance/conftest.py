from sterna.testing.conformance.plugin import guest, make_guest, pytest_generate_tests, to_compare

__all__ = ["guest", "make_guest", "pytest_generate_tests", "to_compare"]
