"""The checks that scenarios make, by the `kind` that their files name them with."""

from sterna.testbed.checks.clocks import ClocksCheck
from sterna.testbed.checks.console import ConsoleCheck
from sterna.testbed.checks.finding import CheckVerdict, Finding
from sterna.testbed.checks.hugepages import HugePagesCheck, SpeedCheck
from sterna.testbed.checks.memory import AuditCheck, ContentCheck, DigestCheck, ReclaimedCheck
from sterna.testbed.checks.network import ConversationCheck, PingCheck, SessionCheck, SilenceCheck
from sterna.testbed.checks.outcome import CancelledCheck, CompletedCheck, DowntimeCheck, OneSideCheck

Check = (
    AuditCheck
    | CancelledCheck
    | ClocksCheck
    | CompletedCheck
    | ConsoleCheck
    | ContentCheck
    | ConversationCheck
    | DigestCheck
    | DowntimeCheck
    | HugePagesCheck
    | OneSideCheck
    | PingCheck
    | ReclaimedCheck
    | SessionCheck
    | SilenceCheck
    | SpeedCheck
)
"""Each has `claim`, what it holds true, and `judge`."""

__all__ = ["Check", "CheckVerdict", "Finding"]
