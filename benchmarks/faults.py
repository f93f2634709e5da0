"""Faults while a store or a server is at work: nothing wrong is served, nobody hangs, all recovers.

``python -m benchmarks.faults [--only NAME ...] [--seconds S] [--seed N] [--json] [--check]``

Each fault has a store and processes of its own. In three parts of equal length clients do random
operations and compare every byte: before the fault, in it, behind it. Then everything must work as
if nothing had been. Those that a process meets itself are in `faults_kinds`, those of a server and
of the network in `faults_server`. *errors*: answers that are StoreErrors, which callers expect.
*wrong*: bytes that were never put, chunks that were deleted, exceptions of any other kind, and what
a fault must not do besides. *stuck*: threads that do not end within a minute. A fault for which
this machine has no means (mounting, a C compiler) is left out, which is said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.fault_means import NotPermittedError, mounted
from benchmarks.fault_shim import Shim
from benchmarks.faults_inside import Outcome
from benchmarks.faults_kinds import FAULTS, ON_DEVICE
from benchmarks.faults_server import SERVER_FAULTS
from benchmarks.table import Bar, add_arguments, report

CHILD_S = 200.0  # beside the seconds at work: stuck threads and recovery have their deadlines
FULL_SIZE = "8m"


def inside(name: str, seconds: float, seed: int) -> Outcome:
    """A fault that one process meets. Raises NotPermittedError."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefixstore-fault-")))
        disk = folder / "disk"
        disk.mkdir()
        if name == "disk full":
            stack.enter_context(mounted(disk, f"size={FULL_SIZE}"))
        environment = dict(os.environ)
        if name in ON_DEVICE:
            environment |= Shim(folder / "control", disk).environment
        words = ["-m", "benchmarks.faults_inside", name, str(folder), str(seconds), str(seed)]
        with (folder / "log").open("wb") as log:
            try:
                found = subprocess.run(
                    [sys.executable, *words], env=environment, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=log, timeout=seconds + CHILD_S,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return Outcome(stuck=1, detail="the process does not end")
        if found.returncode:
            tail = (folder / "log").read_text(errors="replace")[-2000:]
            return Outcome(wrong=1, detail=f"the process ended with {found.returncode}: {tail}")
        return Outcome(**json.loads(found.stdout))


def run(names: Sequence[str], seconds: float, seed: int) -> dict[str, Outcome]:
    """What came of each fault for which there are means."""
    found: dict[str, Outcome] = {}
    for name in names:
        try:
            if name in FAULTS:
                found[name] = inside(name, seconds, seed)
            else:
                found[name] = SERVER_FAULTS[name](seconds, seed)
        except NotPermittedError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
    return found


def rows_and_bars(found: dict[str, Outcome]) -> tuple[list[dict[str, object]], list[Bar]]:
    """The result as a table, and what it must be."""
    rows: list[dict[str, object]] = [
        {
            "fault": name, "operations": one.operations, "errors": one.errors, "wrong": one.wrong,
            "stuck": one.stuck, "recovered": one.recovered, "longest_s": one.longest_s,
            "of_before": one.of_before,
        }
        for name, one in found.items()
    ]  # fmt: skip
    outcomes = list(found.values())
    bars = [
        Bar("wrong", float(sum(one.wrong for one in outcomes)), 0.0, "=="),
        Bar("stuck", float(sum(one.stuck for one in outcomes)), 0.0, "=="),
        Bar("not recovered", float(sum(not one.recovered for one in outcomes)), 0.0, "=="),
        Bar("without an operation", float(sum(not one.operations for one in outcomes)), 0.0, "=="),
    ]
    return rows, bars + [Bar(*bar) for one in outcomes for bar in one.bars]


def main(argv: list[str] | None = None) -> None:
    """See the module docstring."""
    names = [*FAULTS, *SERVER_FAULTS]
    parser = add_arguments(argparse.ArgumentParser(prog="python -m benchmarks.faults"))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME",
                        help=", ".join(names))  # fmt: skip
    parser.add_argument("--seconds", type=float, default=12.0, help="at work, for each fault")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found = run(args.only, args.seconds, args.seed)
    for name, one in found.items():
        if one.detail:
            print(f"{name}: {one.detail}", file=sys.stderr)
    report("Faults under load", *rows_and_bars(found), args)


if __name__ == "__main__":
    main()
