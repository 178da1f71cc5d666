"""The log of a slot that is cleared by more than one call."""

import errno

import pytest

from sterna.hypervisor.interface import DirtyLogMode
from sterna.hypervisor.kvm.dirtylog import CLEAR_DIRTY_LOG, CLEAR_PAGES
from sterna.hypervisor.kvm.dirtyring import RESET_DIRTY_RINGS
from sterna.hypervisor.kvm.ioctl import KvmError


@pytest.mark.parametrize("mode", DirtyLogMode)
def test_a_harvest_protects_again_what_it_found_wherever_that_is(make_guest, mode):
    guest = make_guest(mode, pages=CLEAR_PAGES + 67)
    guest.log()
    ends = ([5], [CLEAR_PAGES - 1, CLEAR_PAGES], [CLEAR_PAGES + 66], [0, CLEAR_PAGES + 65])
    for pages in (*ends, *ends):
        guest.store(pages)
        assert guest.harvest() == pages
        assert guest.harvest() == []


@pytest.mark.parametrize(
    ("mode", "request_", "nth"),
    [
        (DirtyLogMode.MANUAL, CLEAR_DIRTY_LOG, 1),
        (DirtyLogMode.MANUAL, CLEAR_DIRTY_LOG, 2),
        (DirtyLogMode.RING, RESET_DIRTY_RINGS, 1),
    ],
)
def test_a_harvest_that_fails_halfway_loses_nothing(make_guest, monkeypatch, mode, request_, nth):
    guest = make_guest(mode, pages=CLEAR_PAGES + 67)
    guest.log()
    guest.vm.mark_dirty(guest.slot.slot, 64, 1)
    guest.store([5, CLEAR_PAGES])
    call, calls = guest.vm.fd.call, []

    def refuse_once(request, argument=0):
        calls.append(request)
        if request is request_ and calls.count(request) == nth:
            raise KvmError(request, argument, errno.ENOMEM)
        return call(request, argument)

    monkeypatch.setattr(guest.vm.fd, "call", refuse_once)
    with pytest.raises(KvmError, match="ENOMEM"):
        guest.harvest()
    guest.store([7])
    assert guest.harvest() == [5, 7, 64, CLEAR_PAGES]
    assert guest.harvest() == []
