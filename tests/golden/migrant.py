"""A format version 2 that does not exist, the step to it, and a process that is killed on the way.

``python -m tests.golden.migrant FOLDER POINT`` migrates a store and kills itself (SIGKILL) at a
point; ``python -m tests.golden.migrant --kills N --seed S GOLDEN`` kills N migrations of copies of
it at random instants and says how many stores were the old one and how many the new; anything else
is an error.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from prefixstore import Store, admin, config, migrating, rows
from prefixstore.errors import FormatError
from prefixstore.index import Environment, Txn
from prefixstore.migrating import Step
from tests.golden.unpacking import unpack

# Where the process dies -> the format version that the store then has.
POINTS = {"begun": 1, "half": 1, "step": 1, "committed": 2, "partial": 2, "declared": 2}
_at = ""


def _die_at(point: str) -> None:
    if point == _at:
        os.kill(os.getpid(), signal.SIGKILL)


def rewrite(txn: Txn, folder: Path) -> None:
    """Every row gets another version, and there is a file more."""
    _die_at("begun")
    with open(folder / "beside-2", "w") as file:
        file.write("of version 2")
        file.flush()
        os.fsync(file.fileno())
    found = list(txn.scan("chunk"))
    for n, (key, data) in enumerate(found):
        txn.put("chunk", key, b"\2" + data[1:])
        if n == len(found) // 2:
            _die_at("half")
    _die_at("step")


STEPS = (Step(1, 2, "rows of version 2", rewrite),)


@contextmanager
def version_2() -> Iterator[None]:
    """The code as it would be."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(config, "FORMAT_VERSION", 2))
        stack.enter_context(patch.object(rows, "ROW_VERSION", 2))
        stack.enter_context(patch.object(migrating, "STEPS", STEPS))
        made = config.new_settings

        def new_settings(*sizes: object) -> config.Settings:
            return replace(made(*sizes), format_version=2)  # type: ignore[arg-type]

        stack.enter_context(patch("prefixstore.opening.new_settings", new_settings))
        yield


def run(folder: Path, point: str) -> None:
    """Migrate, and die at the point ("": do not)."""
    global _at
    _at = point
    write, replaced = Environment.write, os.replace

    def committed(*given: Any) -> object:
        result: object = write(*given)
        _die_at("committed")
        return result

    def declared(*names: Path) -> None:
        _die_at("partial")
        replaced(*names)
        _die_at("declared")

    with ExitStack() as stack:
        stack.enter_context(version_2())
        stack.enter_context(patch.object(Environment, "write", committed))
        stack.enter_context(patch("prefixstore.config.os.replace", declared))
        migrating.migrate(folder)


def version_of(folder: Path, memory_dir: Path, chunks: int) -> int:
    """Which store it is, having opened and verified it. Raises AssertionError if it is neither."""
    found = []
    for version in (1, 2):
        with ExitStack() as stack:
            if version == 2:
                stack.enter_context(version_2())
            try:
                store = stack.enter_context(Store.open(folder, memory_dir=str(memory_dir)))
            except FormatError:
                continue
            report = admin.verify(store)
            assert report.sound, report
            assert report.chunks["disk"] == chunks, report
            found.append(version)
    assert len(found) == 1, f"opened as versions {found}"
    return found[0]


def kill_many(golden: str, kills: int, seed: int) -> Counter[int]:
    """Migrations killed at random instants; stores by their version."""
    rng = random.Random(seed)
    tally: Counter[int] = Counter()
    whole_s = 0.0
    for kill in range(kills + 1):
        with tempfile.TemporaryDirectory() as scratch:
            folder, chunks = unpack(golden, Path(scratch))
            memory = Path(scratch, "memory")
            memory.mkdir()
            child = os.fork()
            if child == 0:
                run(folder, "")
                os._exit(0)
            if kill == 0:  # not killed, to know how long it takes
                began = time.monotonic()
                os.waitpid(child, 0)
                whole_s = time.monotonic() - began
                continue
            time.sleep(rng.uniform(0, whole_s))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            tally[version_of(folder, memory, len(chunks))] += 1
    return tally


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("point", nargs="?", default="")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kills:
        tally = kill_many(args.store, args.kills, args.seed)
        print(f"{args.kills} kills: old {tally[1]}, new {tally[2]}")
    else:
        run(Path(args.store), args.point)


if __name__ == "__main__":
    main()
