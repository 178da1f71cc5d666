"""How a migration that went through the proxy ended, by what was seen of it."""

from dataclasses import dataclass
from enum import Enum

from sterna.analysis.findings import StreamSurvey
from sterna.analysis.proxy.answers import Answers
from sterna.migration.handshake import PrivateCommand
from sterna.ownership import Outcome as Answered
from sterna.stream.wire import Command


class Outcome(Enum):
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
class Verdict:
    """:ivar reason: why, in one line; empty where the outcome says it all"""

    outcome: Outcome
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
    answer: Answered | None,
) -> Verdict:
    """
    :param survey: of the main stream; None when it could not be looked at to its end
    :param first_end: what ended the connection, in words
    :param closed_first: the source's direction ended before the destination decided
    :param interrupted: the proxy was told to stop
    :param answer: what the destination said when the source asked afterwards who runs the guest
    """
    if answers.runs:
        return Verdict(Outcome.COMPLETED)
    if answers.refusal and not closed_first:
        return Verdict(Outcome.FAILED, f"the destination refused: {answers.refusal}")
    if answers.shut and not closed_first:
        return Verdict(Outcome.FAILED, "the destination could not load the guest")
    if was_committed(survey):
        if answer is Answered.RUNNING:
            return Verdict(
                Outcome.COMPLETED, f"{first_end}; asked again, the destination said that it runs the guest"
            )
        if answer is Answered.ABANDONED:
            return Verdict(
                Outcome.FAILED, f"{first_end}; asked again, the destination said that it gave the guest up"
            )
        return Verdict(Outcome.IN_DOUBT, f"{first_end} before the destination said that it runs the guest")
    if answers.shut == 0:
        return Verdict(Outcome.COMPLETED)
    if survey is None:
        return Verdict(Outcome.UNKNOWN, first_end)
    if survey.main_fault is not None and not survey.main_fault.cut:
        # Whatever came behind it may have been the rest of the guest, and the word to run it.
        return Verdict(Outcome.UNKNOWN, f"{first_end}; the stream cannot be read: {survey.main_fault.text}")
    if survey.complete:
        kinds = {command.kind for command in survey.commands}
        if PrivateCommand.OFFER in kinds:
            return Verdict(Outcome.FAILED, f"{first_end} before the destination was told to run the guest")
        if Command.OPEN_RETURN_PATH in kinds:
            return Verdict(
                Outcome.IN_DOUBT, f"{first_end} before the destination said that it loaded the guest"
            )
        return Verdict(Outcome.UNCONFIRMED, "the source did not open the return path")
    if interrupted:
        return Verdict(Outcome.CANCELLED, "the proxy was interrupted")
    return Verdict(Outcome.FAILED, f"{first_end} within the stream")
