"""The log of a slot that is cleared by more than one call."""

import pytest

from sterna.hypervisor.interface import DirtyLogMode
from sterna.hypervisor.kvm.dirtylog import CLEAR_PAGES


@pytest.mark.parametrize("mode", DirtyLogMode)
def test_a_harvest_protects_again_what_it_found_wherever_that_is(make_guest, mode):
    guest = make_guest(mode, pages=CLEAR_PAGES + 67)
    guest.log()
    ends = ([5], [CLEAR_PAGES - 1, CLEAR_PAGES], [CLEAR_PAGES + 66], [0, CLEAR_PAGES + 65])
    for pages in (*ends, *ends):
        guest.store(pages)
        assert guest.harvest() == pages
        assert guest.harvest() == []
