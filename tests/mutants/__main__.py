"""``python -m tests.mutants`` (`make mutants`): how many of a sample of mutants each folder's own tests kill, and which survive.

A run that was stopped goes on where it was. Exit code 0 only when each folder reaches its score and no control failed.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tests.mutants.campaign import Campaign, InUse, Judged, Score
from tests.mutants.folders import FOLDERS
from tests.mutants.known import Known, read_known

ROOT = Path(__file__).parent.parent.parent
LEAST = 0.85
"""Of a folder's sample, that its tests have to kill."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help=f"of {', '.join(FOLDERS)}; all without")
    parser.add_argument("--sample", type=int, default=200, help="mutants of each folder")
    parser.add_argument("--seed", default="sterna", help="another sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument(
        "--within", type=float, default=float("inf"), metavar="SECONDS", help="no test that takes longer"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".mutants", help="copies of the tree, recordings, results"
    )
    options = parser.parse_args()
    if unknown := set(options.folders) - FOLDERS.keys():
        parser.error(f"no folder {', '.join(sorted(unknown))}: there are {', '.join(FOLDERS)}")
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        campaign = Campaign(ROOT, options.work, options.jobs, options.within, say)
    except InUse as error:
        parser.error(str(error))
    survivors: list[dict[str, object]] = []
    sound = True
    with campaign:
        print(
            "| folder | points | mutants | killed | by a limit or a crash | survived | of them known | score | seconds each |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for name in options.folders or FOLDERS:
            start = time.monotonic()
            score = campaign.judge(name, FOLDERS[name], options.sample, options.seed)
            sound = _show(name, score, time.monotonic() - start, survivors) and sound
    place = options.work / "survivors.json"
    place.write_text(json.dumps(survivors, indent=1) + "\n")
    print(f"{len(survivors)} survivors: {place}")
    return 0 if sound else 1


def _show(name: str, score: Score, seconds: float, survivors: list[dict[str, object]]) -> bool:
    """Print a folder's row and what goes with it, and add its survivors: whether it has its score and can be trusted."""
    known = read_known()
    late = sum(one.how in ("limit", "crash") for one in score.judged)
    share = score.killed / max(1, len(score.judged))
    seen = sum(one.name in known for one in score.survivors)
    print(
        f"| {name} | {score.points} | {len(score.judged)} | {score.killed} | {late} | {len(score.survivors)} "
        f"| {seen} | {share:.0%} | {seconds / max(1, len(score.judged)):.0f} |",
        flush=True,
    )
    survivors += [_told(name, one, known.get(one.name)) for one in score.survivors]
    alarms = [control for control in score.controls if control.killed]
    for control in alarms:
        print(
            f"  {name}: nothing was changed, and {control.test or control.how} failed all the same: {control.why}"
        )
    for path, reason in FOLDERS[name].left_out.items():
        print(f"  {name}: left out: {path}: {reason}")
    return share >= LEAST and not alarms


def _told(folder: str, one: Judged, known: Known | None) -> dict[str, object]:
    return {
        "folder": folder,
        "mutant": one.name,
        "line": one.line,
        "tests": one.tests,
        "kind": known.kind if known else None,
        "reason": known.reason if known else None,
    }


if __name__ == "__main__":
    sys.exit(main())
