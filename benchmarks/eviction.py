"""Which eviction policy keeps most prompt tokens servable? Simulation on synthetic traces.

`python -m benchmarks.eviction [--json] [--check] [--quick] [--sweep] [--scale N]`

Metric: share of all prompt chunks (so of prompt tokens) that the walk from the root finds before
its first miss; mean over cache sizes of 1 to 50 % of the trace's footprint, median over seeds.
`credit`, the chosen policy, is `prefixstore.evict` itself; `min` is the offline optimum.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import mean, median
from typing import Any

from benchmarks.eviction_policies import POLICIES, SWEEP, Cache
from benchmarks.traces import FAMILIES, Request, footprint, make_trace, served_by_min

SIZES = (0.01, 0.05, 0.10, 0.25, 0.50)
CHUNKS = 12_000
SEEDS = 5
CHECK_SLACK = 0.01
STATELESS_SLACK = 0.02


def served(policy: Callable[[int], Cache], trace: list[Request], slots: int) -> float:
    """Return the share of the trace's prompt chunks that `policy` serves with `slots` slots."""
    cache = policy(slots)
    total = sum(request.prompt_chunks for request in trace)
    return sum(cache.request(request) for request in trace) / total


def _measure(
    job: tuple[str, int, int, int, tuple[float, ...], bool],
) -> dict[tuple[str, float], float]:
    """Return the share served per (policy, size) on one trace; runs in a worker process."""
    family, seed, chunks, scale, sizes, sweep = job
    trace = make_trace(family, seed, chunks, scale)
    shares: dict[tuple[str, float], float] = {}
    for size in sizes:
        slots = max(1, int(footprint(trace) * size))
        for name, policy in (SWEEP if sweep else POLICIES).items():
            shares[name, size] = served(policy, trace, slots)
        if not sweep:
            shares["min", size] = served_by_min(trace, slots)
    return shares


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def measure(*, quick: bool, sweep: bool, scale: int) -> dict[str, Any]:
    """Run everything; return the object that `--json` prints (shares between 0 and 1)."""
    sizes = SIZES[1:4] if quick else SIZES
    seeds, chunks = (2, CHUNKS // 2) if quick else (SEEDS, CHUNKS)
    jobs = [(f, seed, chunks, scale, sizes, sweep) for f in FAMILIES for seed in range(seeds)]
    with ProcessPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = dict(zip([job[:2] for job in jobs], pool.map(_measure, jobs), strict=True))
    policies: dict[str, object] = {}
    for name in dict.fromkeys(name for name, _ in found[jobs[0][:2]]):
        by_seed = {
            f: [mean(found[f, seed][name, size] for size in sizes) for seed in range(seeds)]
            for f in FAMILIES
        }
        policies[name] = {
            "families": {f: _summary(by_seed[f]) for f in FAMILIES},
            "mean": _summary([mean(by_seed[f][seed] for f in FAMILIES) for seed in range(seeds)]),
            "by_size": {
                f: {str(z): median(found[f, s][name, z] for s in range(seeds)) for z in sizes}
                for f in FAMILIES
            },
        }
    run = {"seeds": seeds, "chunks": chunks * scale, "scale": scale, "sizes": list(sizes)}
    return {"benchmark": "eviction", "chosen": "credit", **run, "policies": policies}


def shortfalls(policies: dict[str, Any]) -> list[str]:
    """Return a line for each bar that the chosen policy misses.

    Bars: on every family at most 1 % (relative) below LRU; above it on every scan mix; all
    families together, at most 2 percentage points below S3-FIFO, which needs a second queue.
    """
    credit, lru = policies["credit"], policies["lru"]
    out = []
    for family in FAMILIES:
        ours, theirs = (p["families"][family]["median"] for p in (credit, lru))
        if ours < theirs * (1 - CHECK_SLACK):
            out.append(f"{family}: credit {ours:.2%} is more than 1 % below lru {theirs:.2%}")
        if family.startswith("scan") and ours <= theirs:
            out.append(f"{family}: credit {ours:.2%} is not above lru {theirs:.2%}")
    ours, theirs = credit["mean"]["median"], policies["s3fifo"]["mean"]["median"]
    if ours < theirs - STATELESS_SLACK:
        out.append(f"mean: credit {ours:.2%} is over 2 points below s3fifo {theirs:.2%}")
    return out


def _print_table(result: dict[str, Any]) -> None:
    print(
        f"% of prompt tokens served; mean of cache sizes {result['sizes']} of the footprint; "
        f"median of {result['seeds']} seeds (+-: half the range)"
    )
    print(f"{'policy':24}" + "".join(f"{family:>8}" for family in FAMILIES) + "    mean    +-")
    for name, found in result["policies"].items():
        cells = "".join(f"{100 * found['families'][f]['median']:8.1f}" for f in FAMILIES)
        total = found["mean"]
        spread = 50 * (total["highest"] - total["lowest"])
        print(f"{name:24}{cells}{100 * total['median']:8.1f}{spread:6.1f}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument("--check", action="store_true", help="fail where a bar is missed")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 3 sizes, shorter traces")
    parser.add_argument("--sweep", action="store_true", help="constants of credit, not policies")
    parser.add_argument("--scale", type=int, default=1, help="a larger site and longer traces")
    args = parser.parse_args(argv)
    if args.scale < 1 or (args.sweep and args.check):
        parser.error("--scale must be at least 1, and --check needs the policies, not --sweep")
    result = measure(quick=args.quick, sweep=args.sweep, scale=args.scale)
    missed = shortfalls(result["policies"]) if args.check else []
    if args.json:
        print(json.dumps({**result, "missed": missed}))
    else:
        _print_table(result)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
