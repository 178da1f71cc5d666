"""The two forms of flush_remote_tlbs, and what they count."""

from sterna.stage2.tlb import BroadcastFlush, FlushCounters, GenericFlush


class Target:
    """A vCPU that is, or is not, in guest mode."""

    def __init__(self, in_guest):
        self.in_guest = in_guest
        self.calls = []

    def request_tlb_flush(self):
        self.calls.append("request")
        return self.in_guest

    def await_tlb_flush(self):
        self.calls.append("await")


class Hardware:
    broadcasts = 0

    def broadcast_tlbi(self):
        self.broadcasts += 1


def test_generic_form_asks_all_and_waits_for_those_in_guest_mode():
    running, idle = Target(True), Target(False)
    flush = GenericFlush([running, idle])
    flush.flush_remote_tlbs()
    assert running.calls == ["request", "await"]
    assert idle.calls == ["request"]
    assert flush.counters == FlushCounters(flushes=1, requests=2, vcpu_exits=1)


def test_broadcast_form_is_one_broadcast():
    hardware = Hardware()
    flush = BroadcastFlush(hardware)
    flush.flush_remote_tlbs()
    assert hardware.broadcasts == 1
    assert flush.counters == FlushCounters(flushes=1, broadcasts=1)
