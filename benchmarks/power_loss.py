"""The power goes at any moment of a run: what was promised is there, and nothing wrong is served.

``python -m benchmarks.power_loss [--cases N] [--seed S] [--json] [--check]``

The writes of a run of several processes are recorded in order (`power_loss_record`), syncs among
them: the durable index, the disk tier, settings, and names of files. A case is a moment of that run
and a choice of which unsynced writes are lost (`power_loss_replay`): all, none, some, or parts of
some. The files are made as they were left, the memory tier and the live index are gone, and
another process opens the store and looks at it as after a kill (`crash_check`). Promised is what a
flush had acknowledged, or a removal. A run serves some hundred cases, then another is recorded.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.crash import SHOWN, look, shared
from benchmarks.crash_check import Promises
from benchmarks.crash_roles import SCENES, Scene, lines_of
from benchmarks.power_loss_record import record
from benchmarks.power_loss_replay import CHOICES, WRITE, Disk, Record, records_of
from benchmarks.table import Bar, add_arguments, report

CASES_OF_A_RUN, STEPS = 200, 25
DURABLE_SCENES = [scene for scene in SCENES if scene.disk_bytes]


@dataclass(frozen=True)
class Recorded:
    """The calls of one run, in a folder of its own."""

    base: Path
    seed: int
    scene: Scene
    records: list[Record]


@contextmanager
def recorded(seed: int, steps: int = STEPS) -> Iterator[Recorded]:
    """Record a run."""
    with tempfile.TemporaryDirectory(prefix="prefixstore-power-", dir=shared()) as name:
        base, scene = Path(name), DURABLE_SCENES[seed % len(DURABLE_SCENES)]
        (base / "memory").mkdir()
        log = record(base, base / "memory", scene, seed, steps)
        yield Recorded(base, seed, scene, list(records_of(log)))


class Cases:
    """What became of all cases."""

    def __init__(self) -> None:
        self.done: Counter[tuple[str, str]] = Counter()  # by scene and choice
        self.faults: list[str] = []
        self.records = self.unsure = self.promised = 0

    def play(self, run: Recorded, count: int) -> None:
        """Stop a run at that many moments."""
        rng = random.Random(run.seed)
        self.records += len(run.records)
        disk, diary, at = Disk(str(run.base / "watched")), bytearray(), 0
        for moment in sorted(rng.randint(1, len(run.records)) for _ in range(count)):
            for one in run.records[at:moment]:
                disk.apply(one)
                if one.kind == WRITE and disk.name_of(one.inode) == "diary":
                    diary += one.data
            at = moment
            choice = rng.choice(CHOICES)
            folder, memory = run.base / "left", run.base / "memory"
            folder.mkdir()
            disk.after_power_loss(folder, rng, choice)
            promises = Promises.read(lines_of(bytes(diary)), run.scene, durable=True)
            faults, _ = look((folder / "store", memory, run.scene, promises, True))
            self.done[run.scene.name, choice] += 1
            self.promised += len(promises.there)
            self.unsure += sum(len(file.since) for file in disk.files)
            where = f"seed {run.seed}, after {moment} of {len(run.records)} calls, {choice}"
            self.faults += [f"{where}: {fault}" for fault in faults]
            _empty((folder, *memory.iterdir()))


def _empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def main(arguments: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.power_loss")
    add_arguments(parser)
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    args = parser.parse_args(arguments)
    cases, started = Cases(), time.monotonic()
    with suppress(KeyboardInterrupt):  # what was done until then is reported
        for number in range(-(-args.cases // CASES_OF_A_RUN)):
            left = args.cases - number * CASES_OF_A_RUN
            with recorded(args.seed + number) as run:
                cases.play(run, min(left, CASES_OF_A_RUN))
    for line in cases.faults[:SHOWN]:
        print(line, file=sys.stderr)
    rows: list[dict[str, object]] = [
        {"store": scene, "unsynced": choice, "cases": count}
        for (scene, choice), count in sorted(cases.done.items())
    ]
    rows += [
        {"store": f"({name})", "unsynced": "", "cases": value}
        for name, value in (
            ("calls recorded", cases.records), ("unsynced calls at the moments", cases.unsure),
            ("promises looked at", cases.promised), ("seconds", round(time.monotonic() - started)),
        )
    ]  # fmt: skip
    bars = [
        Bar("faults", float(len(cases.faults)), 0.0, "<="),
        Bar("cases", float(sum(cases.done.values())), float(args.cases), ">="),
    ]
    report("Power loss", rows, bars, args)


if __name__ == "__main__":
    main()
