"""TLB maintenance: the flush that ends every write protection, in its two forms.

Generic (Linux, kvm_flush_remote_tlbs): a request to every vCPU; each leaves guest mode, flushes its own TLB and acknowledges.
An architecture's own (CONFIG_HAVE_KVM_ARCH_TLB_FLUSH_ALL; Linux a6d51016cbd6): on ARM one TLBIALLIS, which the hardware
broadcasts; no vCPU exits. Both return only when no CPU can write through an old entry any more, nor is in a walk that began
before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass
class FlushCounters:
    """What flushes cost.

    :ivar flushes: calls of `flush_remote_tlbs`
    :ivar requests: requests made to vCPUs by the generic form
    :ivar vcpu_exits: vCPUs that had to leave guest mode for one
    :ivar broadcasts: invalidations broadcast by the architecture's own form
    """

    flushes: int = 0
    requests: int = 0
    vcpu_exits: int = 0
    broadcasts: int = 0


class FlushTarget(Protocol):
    """A vCPU, as the generic flush sees it."""

    def request_tlb_flush(self) -> bool:
        """Flush before guest mode is entered again: whether the vCPU was in guest mode and is being made to leave it."""
        ...

    def await_tlb_flush(self) -> None:
        """Return when the request has been served, or the vCPU is out of guest mode and will serve it before it enters."""
        ...


class Broadcaster(Protocol):
    """Hardware that broadcasts TLB maintenance to all CPUs."""

    def broadcast_tlbi(self) -> None:
        """Invalidate every entry of this VM's VMID on every CPU, and wait for completion (TLBIALLIS; DSB ISH)."""
        ...


class RemoteTlbFlush(Protocol):
    """`flush_remote_tlbs` in one of its forms."""

    counters: FlushCounters

    def flush_remote_tlbs(self) -> None:
        """Return when no CPU holds a translation from before the call, or is about to get one from a walk that began before."""
        ...


class GenericFlush:
    """The form every architecture can use.

    :ivar targets: the vCPUs, read anew at each flush
    """

    def __init__(self, targets: Sequence[FlushTarget]) -> None:
        self.targets = targets
        self.counters = FlushCounters()

    def flush_remote_tlbs(self) -> None:
        """A request to every vCPU, then an acknowledgement from each that was in guest mode."""
        self.counters.flushes += 1
        leaving = []
        for target in self.targets:
            self.counters.requests += 1
            if target.request_tlb_flush():
                self.counters.vcpu_exits += 1
                leaving.append(target)
        for target in leaving:
            target.await_tlb_flush()


class BroadcastFlush:
    """ARM's own form: one broadcast, no exits."""

    def __init__(self, hardware: Broadcaster) -> None:
        self.hardware = hardware
        self.counters = FlushCounters()

    def flush_remote_tlbs(self) -> None:
        """One hardware broadcast."""
        self.counters.flushes += 1
        self.counters.broadcasts += 1
        self.hardware.broadcast_tlbi()
