"""``python -m tests.detection`` (`make detection`): the table of faults and how many runs found them, and false alarms.

Exit code 0 only when each run found its fault and no sound migration had an alarm.
"""

import argparse
import os
import sys

from tests.detection.campaign import DETECTORS, WAYS, Campaign, Score, stopwatch, timed
from tests.detection.zygote import Zygote


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.detection", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="of each fault's reduced scenario")
    parser.add_argument("--full", type=int, default=10, help="of each fault's whole scenario")
    parser.add_argument("--busy", type=int, default=10, help="reduced, with two busy loops beside")
    parser.add_argument("--sound", type=int, default=500, help="sound migrations; a tenth of them on KVM")
    parser.add_argument("--breakage", action="append", choices=sorted(DETECTORS), help="only this one")
    options = parser.parse_args()
    wanted = dict(zip((way.name for way in WAYS), (options.runs, options.full, options.busy), strict=True))
    told: list[str] = []
    missed, alarms = 0, 0
    whole = stopwatch()
    with Zygote() as zygote:
        campaign = Campaign(zygote, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
        print("| breakage | found by | reduced | full | two busy loops |")
        print("|---|---|---|---|---|")
        totals = {way.name: Score(0, 0, 0.0, []) for way in WAYS}
        for breakage in options.breakage or DETECTORS:
            cells = []
            for way in WAYS:
                score = campaign.detect(breakage, way, wanted[way.name])
                cells.append(f"{score.hits}/{score.total}")
                missed += score.total - score.hits
                told += score.told
                totals[way.name].seconds += score.seconds
                totals[way.name].total += score.total
            name, check = DETECTORS[breakage]
            print(f"| `{breakage}` | `{name}`: `{check}` | {' | '.join(cells)} |", flush=True)
        kvm = options.sound // 10 if os.access("/dev/kvm", os.R_OK | os.W_OK) else 0
        sound = [
            (accel, campaign.sound(accel, count))
            for accel, count in (("emulated", options.sound - kvm), ("kvm", kvm))
            if count
        ]
    for accel, score in sound:
        alarms += score.hits
        told += score.told
        print(f"sound migrations, {accel}: {score.hits} alarms in {score.total}")
    print(*(f"{name}: {timed(score.seconds, score.total)}" for name, score in totals.items()), sep="; ")
    print(*told, f"{missed} missed, {alarms} false alarms, {whole():.0f} s in all", sep="\n")
    return 1 if missed or alarms else 0


if __name__ == "__main__":
    sys.exit(main())
