"""``python -m tests.mutants`` (`make mutants`): how many of a sample of mutants each folder's own tests kill, and which survive.

A run that was stopped goes on where it was. Exit code 0 only when each folder reaches its score and no control failed.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tests.mutants.campaign import Campaign
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
    known = read_known()
    began = time.monotonic()
    campaign = Campaign(
        ROOT,
        "sterna",
        options.work,
        options.jobs,
        options.within,
        lambda text: print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True),
    )
    print(
        "| folder | points | mutants | killed | by a time limit | survived | of them known | score | seconds each |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    survivors: list[dict[str, object]] = []
    sound = True
    for name in options.folders or FOLDERS:
        start = time.monotonic()
        score = campaign.judge(name, FOLDERS[name], options.sample, options.seed)
        each = (time.monotonic() - start) / max(1, len(score.judged))
        late = sum(one.how == "time limit" for one in score.judged)
        seen = [known.get(one.name) for one in score.survivors]
        share = score.killed / max(1, len(score.judged))
        print(
            f"| {name} | {score.points} | {len(score.judged)} | {score.killed} | {late} | {len(seen)} "
            f"| {sum(one is not None for one in seen)} | {share:.0%} | {each:.0f} |",
            flush=True,
        )
        for one, entry in zip(score.survivors, seen, strict=True):
            survivors.append(_told(name, one.name, one.line, one.tests, entry))
        for control in score.controls:
            if control.killed:
                sound = False
                print(f"  {name}: nothing was changed, and {control.test} failed all the same: {control.why}")
        for path, reason in FOLDERS[name].left_out.items():
            print(f"  {name}: left out: {path}: {reason}")
        sound = sound and share >= LEAST
    place = options.work / "survivors.json"
    place.write_text(json.dumps(survivors, indent=1) + "\n")
    print(f"{len(survivors)} survivors: {place}")
    return 0 if sound else 1


def _told(folder: str, name: str, line: int, tests: int, known: Known | None) -> dict[str, object]:
    return {
        "folder": folder,
        "mutant": name,
        "line": line,
        "tests": tests,
        "kind": known.kind if known else None,
        "reason": known.reason if known else None,
    }


if __name__ == "__main__":
    sys.exit(main())
