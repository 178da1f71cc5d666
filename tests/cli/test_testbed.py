"""What `sterna testbed` prints."""

from collections.abc import Callable, Sequence

import pytest

from sterna.cli import testbedrun
from sterna.launch.errors import VmError
from sterna.launch.process import VmProcess
from sterna.testbed.armhost import image
from sterna.testbed.checks import CheckVerdict
from sterna.testbed.checks.finding import Finding
from sterna.testbed.errors import ImageError
from sterna.testbed.runner import Result, ScenarioOutcome

TITLE = "\x1b]0;title\x07\x9b2J\nsecond"
"""Sets a terminal's title and clears its screen."""
HARMLESS = r"\x1b]0;title\x07\x9b2J"


@pytest.mark.parametrize(
    "result",
    [
        Result("one", TITLE, "emulated", ScenarioOutcome.ERROR, 1.0, reason=TITLE, note=TITLE),
        Result(
            *("two", "title", "emulated", ScenarioOutcome.ERROR, 1.0),
            [Finding("check", TITLE, CheckVerdict.FAILED, TITLE, problems=[TITLE])],
            reason=TITLE,
        ),
    ],
    ids=["a reason", "findings"],
)
def test_what_a_guest_said_cannot_command_the_terminal(
    result: Result, capfd: pytest.CaptureFixture[str]
) -> None:
    testbedrun._show(result)
    testbedrun._summarise([result], 1.0)
    testbedrun._say(TITLE)
    testbedrun._say(TITLE, "one")
    shown, said = capfd.readouterr()
    assert not {"\x1b", "\x07", "\x9b"} & set(shown + said)
    assert shown.count(f"{HARMLESS}\nsecond") >= 3
    assert said.count(f"{HARMLESS}\nsecond") == 2


class Talker(VmProcess):
    """Complains, and ends."""

    def _command(self, qmp: int, serial: int) -> Sequence[str]:
        return ["sh", "-c", r"printf 'first\n\033]0;title\007\n' >&2"]


def test_nor_can_what_a_vm_complained() -> None:
    with Talker("vm") as vm, pytest.raises(VmError) as error:
        vm.ready()
    assert str(error.value) == r"the vm did not start: \x1b]0;title\x07"


def test_nor_can_what_kept_an_image_from_being_built(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ImageError(f"it does not work\n{TITLE}")

    monkeypatch.setattr(image, "obtain", fail)
    assert cli("testbed", "host", "arm64", "--", "true") == (
        1,
        "",
        f"{HARMLESS}\nsecond\nsterna: error: it does not work\n",
    )
