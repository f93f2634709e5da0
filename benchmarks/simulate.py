"""The store's own code, run by a simulated scheduler on a simulated machine, seed after seed.

``python -m benchmarks.simulate [--seeds N] [--first S] [--minutes M] [--workers W] [--json]
[--check]``

Each seed is a run of its own: one to three processes at a time open one store and put, get, lease,
delete, pin, expire, retire, flush and verify, while processes are killed, the power fails, calls
fail, threads are held up and the clock jumps, as the seed draws it (`benchmarks.simulation`). All
that is read is compared with what was put, each commit with the bytes it speaks of, and when all is
quiet nothing may be left over and the books must add up. With ``--minutes`` it goes on past
``--seeds`` until the time is over. A failure is printed with the seed that repeats it:
``--first S --seeds 1``; ``--trace FILE`` writes every step of that run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.simulation.world import Result, simulate
from benchmarks.table import Bar, add_arguments, report

SHOWN = 20
AT_ONCE = 50  # seeds a worker takes at a time


def batch(seeds: range) -> list[Result]:
    """Some seeds, in a process of their own."""
    return [simulate(seed) for seed in seeds]


def results(args: argparse.Namespace, end: float) -> Iterator[Result]:
    """Seed after seed, on all workers."""
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:
        first, last = args.first, args.first + args.seeds
        while first < last or time.monotonic() < end:
            size = args.workers * AT_ONCE
            stop = min(first + size, last) if first < last else first + size
            parts = [range(at, min(at + AT_ONCE, stop)) for at in range(first, stop, AT_ONCE)]
            for found in pool.map(batch, parts, chunksize=1):
                yield from found
            first = stop


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate")
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on for so long")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with its own seeds")
    parser.add_argument("--trace", type=Path, help="write the steps of the first seed here")
    args = parser.parse_args()
    if args.trace is not None:
        steps: list[str] = []
        print(simulate(args.first, log=steps).failure or "it ended well", file=sys.stderr)
        args.trace.write_text("".join(steps))
        return
    began = time.monotonic()
    total: Counter[str] = Counter()
    failures, seeds, steps_made, simulated_s = [], 0, 0, 0.0
    for result in results(args, began + 60 * args.minutes):
        seeds += 1
        steps_made += result.steps
        simulated_s += result.simulated_s
        total += result.counts
        if result.failure:
            failures.append(f"--first {result.seed} --seeds 1: {result.failure}")
    took_s = time.monotonic() - began
    row = {
        "seeds": seeds,
        "steps": steps_made,
        "operations": total["operations"],
        "kills": total["kills"],
        "power_cuts": total["power_cuts"],
        "faults": total["faults"],
        "stalls": total["stalls"],
        "clock_jumps": total["jumps"],
        "hits_checked": total["hits"],
        "simulated_h": round(simulated_s / 3600, 2),
        "minutes": round(took_s / 60, 2),
        "interleavings_per_s": round(seeds / took_s, 1),
        "steps_per_s": round(steps_made / took_s),
        "failures": len(failures),
    }
    for line in failures[:SHOWN]:
        print(line, file=sys.stderr)
    report("Simulation", [row], [Bar("seeds that failed", float(len(failures)), 0.0, "<=")], args)


if __name__ == "__main__":
    main()
