"""How a migration that went through the proxy ended, by what was seen of it."""

from dataclasses import dataclass
from enum import Enum

from sterna.analysis.findings import StreamSurvey
from sterna.analysis.proxy.answers import Answers
from sterna.migration.handshake import PrivateCommand
from sterna.ownership import AttemptOutcome
from sterna.stream.wire import Command


class ProxyOutcome(Enum):
    """What became of the guest, as far as it can be told."""

    COMPLETED = "completed"
    """The destination said that it runs or has loaded the guest."""
    UNCONFIRMED = "completed, unconfirmed"
    """The whole stream went through; the source did not ask for answers."""
    FAILED = "failed"
    """The stream was cut or refused: the guest goes on at the source."""
    CANCELLED = "cancelled"
    """The proxy was interrupted before all of the stream had gone through: the guest goes on at the source."""
    UNREACHABLE = "unreachable"
    """The destination could not be connected to."""
    IN_DOUBT = "in doubt"
    """The destination has all of the guest, and nobody heard it say whether it runs."""
    UNKNOWN = "unknown"
    """What went through cannot be understood."""
    NOTHING = "nothing"
    """No migration came."""


@dataclass(frozen=True)
class ProxyVerdict:
    """:ivar reason: why, in one line; empty where the outcome says it all"""

    outcome: ProxyOutcome
    reason: str = ""


def was_committed(survey: StreamSurvey | None) -> bool:
    """Whether a sterna was told to run the guest."""
    return survey is not None and any(command.kind == PrivateCommand.COMMIT for command in survey.commands)


def judge(
    survey: StreamSurvey | None,
    answers: Answers,
    first_end: str,
    *,
    closed_first: bool,
    interrupted: bool,
    answer: AttemptOutcome | None,
) -> ProxyVerdict:
    """
    :param survey: of the main stream; None when it could not be looked at to its end
    :param first_end: what ended the connection, in words
    :param closed_first: the source's direction ended before the destination decided
    :param interrupted: the proxy was told to stop
    :param answer: what the destination said when the source asked afterwards who runs the guest
    """
    if answers.runs:
        return ProxyVerdict(ProxyOutcome.COMPLETED)
    if answers.refusal and not closed_first:
        return ProxyVerdict(ProxyOutcome.FAILED, f"the destination refused: {answers.refusal}")
    if answers.shut and not closed_first:
        return ProxyVerdict(ProxyOutcome.FAILED, "the destination could not load the guest")
    if was_committed(survey):
        if answer is AttemptOutcome.RUNNING:
            return ProxyVerdict(
                ProxyOutcome.COMPLETED,
                f"{first_end}; asked again, the destination said that it runs the guest",
            )
        if answer is AttemptOutcome.ABANDONED:
            return ProxyVerdict(
                ProxyOutcome.FAILED,
                f"{first_end}; asked again, the destination said that it gave the guest up",
            )
        return ProxyVerdict(
            ProxyOutcome.IN_DOUBT, f"{first_end} before the destination said that it runs the guest"
        )
    if answers.shut == 0:
        return ProxyVerdict(ProxyOutcome.COMPLETED)
    if survey is None:
        return ProxyVerdict(ProxyOutcome.UNKNOWN, first_end)
    if survey.main_fault is not None and not survey.main_fault.cut:
        # Whatever came behind it may have been the rest of the guest, and the word to run it.
        return ProxyVerdict(
            ProxyOutcome.UNKNOWN, f"{first_end}; the stream cannot be read: {survey.main_fault.text}"
        )
    if survey.complete:
        kinds = {command.kind for command in survey.commands}
        if PrivateCommand.OFFER in kinds:
            return ProxyVerdict(
                ProxyOutcome.FAILED, f"{first_end} before the destination was told to run the guest"
            )
        if Command.OPEN_RETURN_PATH in kinds:
            return ProxyVerdict(
                ProxyOutcome.IN_DOUBT, f"{first_end} before the destination said that it loaded the guest"
            )
        return ProxyVerdict(ProxyOutcome.UNCONFIRMED, "the source did not open the return path")
    if interrupted:
        return ProxyVerdict(ProxyOutcome.CANCELLED, "the proxy was interrupted")
    return ProxyVerdict(ProxyOutcome.FAILED, f"{first_end} within the stream")
