"""``python -m tests.fuzz``: all targets in turn, each in a process of its own with bounded memory."""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz import corpus
from tests.fuzz.parts import Parts, load, pack
from tests.fuzz.run import HANG_SECONDS, Finding, Result, fuzz, replay
from tests.fuzz.targets import TARGETS

ADDRESS_SPACE = 160 << 30
"""RLIMIT_AS of a target's process: compiled code and guest RAM are mapped sparsely, what is used is watched apart."""
_GRACE_SECONDS = 2 * HANG_SECONDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the mutations")
    parser.add_argument(
        "--target", action="append", choices=sorted(TARGETS), help="this one only; may be repeated"
    )
    parser.add_argument("--corpus", type=Path, help="a directory that a run before has left, or a new one")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where inputs are left")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input of one --target")
    options = parser.parse_args()
    targets = options.target or list(TARGETS)
    if options.replay:
        for target in targets:
            print(f"{target}: {replay(target, load(options.replay))}")
        return 0
    with tempfile.TemporaryDirectory(prefix="sterna-fuzz-") as folder:
        recordings = options.corpus or Path(folder) / "corpus"
        if not recordings.exists():
            print(f"recording into {recordings}", flush=True)
            recordings.mkdir(parents=True)
            corpus.build(recordings)
        seconds = options.minutes * 60 / len(targets)
        results = [_run(target, recordings, options.seed, seconds, Path(folder)) for target in targets]
    findings = [finding for result in results for finding in result.findings]
    for finding in findings:
        options.findings.mkdir(exist_ok=True)
        path = options.findings / f"{finding.target}-{abs(hash(finding.what)) % 10**8}"
        path.write_bytes(pack(finding.parts))
        print(f"{finding.target}: {finding.what}\n    input: {path}")
    print(json.dumps({
        "seed": options.seed,
        "inputs": sum(result.count for result in results),
        "seconds": round(sum(result.seconds for result in results), 1),
        "findings": len(findings),
    }))  # fmt: skip
    return 1 if findings else 0


def _run(target: str, recordings: Path, seed: int, seconds: float, folder: Path) -> Result:
    """Fuzz a target in a process of its own, which may die or hang."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    current = folder / "current"
    worker = context.Process(target=_work, args=(target, recordings, seed, seconds, current, send))
    worker.start()
    send.close()
    result = Result(target, seed)
    deadline = time.monotonic() + seconds + _GRACE_SECONDS
    try:
        if not receive.poll(max(0.0, deadline - time.monotonic())):
            result.findings.append(Finding(target, "hang: not even a signal ends it", load(current)))
        else:
            result = receive.recv()
    except EOFError:
        worker.join()
        what = f"the process died: exit code {worker.exitcode}"
        result.findings.append(Finding(target, what, load(current)))
    finally:
        worker.kill()
        worker.join()
    figures = {name: value for name, value in asdict(result).items() if name in ("count", "seconds", "kept")}
    print(
        f"{target:15s} {figures['count']:8d} inputs in {figures['seconds']:6.1f} s, {figures['kept']:4d} kept, "
        f"memory +{result.grown_bytes >> 20} MiB, {len(result.findings)} findings",
        flush=True,
    )
    return result


def _work(target: str, recordings: Path, seed: int, seconds: float, current: Path, send: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))

    def note(parts: Parts, result: Result) -> None:
        current.write_bytes(pack(parts))

    send.send(fuzz(target, recordings, seed, seconds=seconds, watch=note))


if __name__ == "__main__":
    sys.exit(main())
