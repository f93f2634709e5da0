"""Coverage-guided fuzzing of every parser: what a stranger's bytes do to it.

``python -m benchmarks.fuzz [--target NAME ...] [--seconds S] [--jobs N] [--keep] [--json]``

Each target (`fuzz_targets`) is run for S seconds by atheris (libFuzzer), which must be
installed (``pip install atheris``; it is no dependency). ``--keep`` writes the inputs that matter,
minimised, to ``fuzz_corpora``; tests/fuzz replays them. Exits 1 if there is a finding: an exception
that is not the parser's contract, an answer that is wrong, a crash, a hang.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.fuzz_target import read_corpus, smallest_cover, write_corpus
from benchmarks.fuzz_targets import TARGETS

GRACE_S = 120.0  # beyond the time of a run, for its start
_STATE = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+)")


@dataclass
class Outcome:
    """What became of a target."""

    target: str
    seconds: float
    cpu_seconds: float
    inputs: int = 0
    covered: int = 0
    findings: list[dict[str, str]] = field(default_factory=list)
    ended: str = ""  # why, if not at the end of its time


def run(name: str, seconds: int, seed: int, folder: Path) -> Outcome:
    """Fuzz one target."""
    began = time.monotonic()
    command = [
        sys.executable, "-m", "benchmarks.fuzz_child", name, str(folder),
        f"-max_total_time={seconds}", f"-seed={seed}",
    ]  # fmt: skip
    log = folder / "log"
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file)
        late = threading.Timer(seconds + GRACE_S, child.kill)
        late.start()
        _, status, used = os.wait4(child.pid, 0)  # which says what it used, and of this one only
        late.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    ended = f"exit {child.returncode}" if child.returncode else ""
    done = Outcome(name, round(time.monotonic() - began, 1), used.ru_utime + used.ru_stime)
    done.ended = ended
    executed = re.search(r"number_of_executed_units:\s+(\d+)", text)
    states = _STATE.findall(text)
    done.inputs = int(executed[1]) if executed else int(states[-1][0]) if states else 0
    done.covered = int(states[-1][1]) if states else 0
    done.findings = [json.loads(path.read_text()) for path in (folder / "findings").glob("*.json")]
    if ended:
        print(text[-3000:], file=sys.stderr)
    return done


def keep(name: str, folder: Path) -> None:
    """Take the inputs that matter into the tree, with those of findings."""
    target = TARGETS[name]
    learned = [path.read_bytes() for path in (folder / "corpus").iterdir()]
    write_corpus(name, [*read_corpus(name), *smallest_cover(target, learned)])


def main(arguments: list[str] | None = None) -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description="Coverage-guided fuzzing of every parser.")
    parser.add_argument("--target", nargs="*", choices=sorted(TARGETS), help="default: all")
    parser.add_argument("--seconds", type=int, default=600, help="of each target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="write the corpora of the tree")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris is not installed: pip install atheris", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:

        def one(name: str) -> Outcome:
            folder = Path(scratch) / name
            folder.mkdir()
            return run(name, args.seconds, args.seed, folder)

        outcomes = []
        for done in pool.map(one, args.target or sorted(TARGETS)):
            outcomes.append(done)
            if args.keep:
                keep(done.target, Path(scratch) / done.target)
            told = "; ".join(found["where"] for found in done.findings) or "nothing found"
            print(
                f"{done.target:18} {done.cpu_seconds:7.1f} s of CPU {done.inputs:>10,} inputs "
                f"{done.covered:>6,} covered  {told} {done.ended}",
                file=sys.stderr,
            )
    cpu_seconds = round(sum(done.cpu_seconds for done in outcomes), 1)
    result = {"targets": [asdict(done) for done in outcomes], "cpu_seconds": cpu_seconds}
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        for done in outcomes:
            for found in done.findings:
                print(f"--- {done.target}: {found['where']}\n{found['text']}{found['data']}\n")
        print(f"{len(outcomes)} targets, {cpu_seconds} s of CPU")
    return int(any(done.findings or done.ended for done in outcomes))


if __name__ == "__main__":
    sys.exit(main())
