"""The table of what the test bed finds, in small: `make detection` makes it whole."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.detection import campaign
from tests.detection.campaign import DETECTORS, WAYS, Campaign
from tests.detection.zygote import Zygote

pytestmark = pytest.mark.slow

TABLE = re.compile(
    r"^\| `(\S+)` \| `(\S+)`: `(\S+)` \| (\d+)/(\d+) \| (\d+)/(\d+) \| (\d+)/(\d+) \|$", re.MULTILINE
)
ROOT = Path(__file__).parent.parent.parent


def test_every_fault_is_found_and_nothing_else_is() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.detection",
            "--runs",
            "1",
            "--full",
            "0",
            "--busy",
            "0",
            "--sound",
            "10",
        ],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "src"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row[0]: row[1:] for row in TABLE.findall(done.stdout)}
    assert rows == {
        breakage: (*detector, "1", "1", "0", "0", "0", "0") for breakage, detector in DETECTORS.items()
    }
    assert "sound migrations, emulated: 0 alarms in " in done.stdout
    assert "0 missed, 0 false alarms" in done.stdout


def test_what_is_not_found_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No audit finds that huge pages stay dissolved."""
    monkeypatch.setitem(campaign.DETECTORS, "no-rebuild", ("checksum", "audit"))
    with Zygote() as zygote:
        score = Campaign(zygote).detect("no-rebuild", WAYS[0], 1)
    assert (score.hits, score.total) == (0, 1)
    [told] = score.told
    assert told.startswith("no-rebuild, reduced run 0: passed")


def test_an_alarm_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Migrations that are said to be sound, of VMs with a fault."""

    def broken(zygote: Zygote, accel: str) -> campaign.ForkedKind:
        return kind(zygote, accel, "forget-mark")

    kind = campaign.ForkedKind
    monkeypatch.setattr(campaign, "ForkedKind", broken)
    with Zygote() as zygote:
        score = Campaign(zygote).sound("emulated", 2)
    assert score.hits == 1
    assert "0x40200000" in score.told[0]
