"""What a store is worth to 10 to 1,000 engines: simulated, with costs that were measured.

``python -m benchmarks.scale [--json] [--check] [--quick] [--engines N ..] [--traces NAME ..]
[--trace-file FILE] [--seed N]``, and an option for everything that is assumed (``--help``)

Traces: ``chat``, ``rag`` and ``documents`` of `benchmarks.traces`, which grow with the fleet, or a
file in the format of Mooncake's public traces. Each is replayed without the store, with it, and
where documents stand in any order also with blending. `docs/scale.md` says what is modelled.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale_costs import Costs, measured
from benchmarks.scale_fleet import ASSUMED, TIERS, Fleet
from benchmarks.scale_run import Run, Totals
from benchmarks.table import Bar, add_arguments, report
from benchmarks.traces import Request, make_trace

ENGINES = (10, 30, 100, 300, 1000)
TRACES = ("chat", "rag", "documents")
UNITS = 1500  # of prompts, for each engine; the first half warms the caches
SCALE = {"chat": 2}  # 48 open conversations for each engine; else 150 documents
LEAST = 60  # engines; smaller fleets are run several times, each with its own trace
FILE_TOKENS = 512  # of a block in Mooncake's traces
POOL_WAYS = ("pool in", "pool out")
KINDS = {"int": int, "float": float, "str": str}
SOURCES = ("gpu", *TIERS, "blended", "computed")
Arrivals = list[tuple[float, Request]]


def arrivals(trace: Sequence[Request], fleet: Fleet, seed: int) -> Arrivals:
    """Give requests times: a Poisson process of ``fleet.tokens_s`` for each engine."""
    rng = random.Random(f"arrivals/{seed}")
    tokens = statistics.mean(one.prompt_chunks for one in trace) * fleet.unit_tokens
    rate = fleet.engines * fleet.tokens_s / tokens
    at_s, found = 0.0, []
    for request in trace:
        at_s += rng.expovariate(rate)
        found.append((at_s, request))
    return found


def read_trace(path: Path, limit: int) -> Arrivals:
    """The requests of a file whose lines are ``{"timestamp": ms, "hash_ids": [..]}``: the names of
    the prompt's blocks of FILE_TOKENS tokens. Raises ValueError."""
    found: Arrivals = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                told = json.loads(line)
                blocks = tuple(map(int, told["hash_ids"]))
                found.append((float(told["timestamp"]) / 1000, Request(blocks, len(blocks))))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: {error!r}; give {{"timestamp": ms, "hash_ids": [..]}}'
                ) from error
            if len(found) == limit:
                break
    return sorted((one for one in found if one[1].path), key=lambda one: one[0])


def row_of(name: str, fleet: Fleet, runs: Sequence[Totals]) -> dict[str, Any]:
    """A row of the table, of several runs together. Shares are of prompt tokens; times in s."""
    units = {source: sum(run.units[source] for run in runs) for source in SOURCES}
    saved = {what: sum(run.saved[what] for run in runs) for what in ("kept", "dropped")}
    total = sum(units.values())
    tokens = total * fleet.unit_tokens
    window_s = sum(run.window_s for run in runs)
    times = np.array([one for run in runs for one in run.ttft_s])
    busy = {
        kind: statistics.mean(run.busy[kind][0] for run in runs)
        for kind in runs[0].busy
    }  # fmt: skip
    most = max(busy, key=lambda kind: busy[kind])
    gpu_s = sum(run.engine_s for run in runs) / fleet.busy
    nodes_s = fleet.nodes * window_s
    price = (gpu_s * fleet.gpu_hour + nodes_s * fleet.node_hour) / 3600
    return {
        "trace": name,
        "store": "blend" if fleet.blend else "yes" if fleet.store else "no",
        "engines": fleet.engines,
        "requests": len(times),
        **{source: units[source] / total for source in SOURCES},
        "save_dropped": saved["dropped"] / max(1, sum(saved.values())),
        "network_gb_s": sum(run.network_bytes for run in runs) / window_s / 1e9,
        "ttft_p50": float(np.quantile(times, 0.5)),
        "ttft_p99": float(np.quantile(times, 0.99)),
        "busiest": most,
        **{f"busy {kind}": share for kind, share in busy.items()},
        "most_of_a_node": max(
            run.busy[kind][1] for run in runs for kind in ("pool in", "pool out")
        ),
        "usd_per_mtok": price / tokens * 1e6,
    }


def simulate(
    name: str, fleets: Sequence[Fleet], costs: Costs, seed: int, units: int, read: Arrivals | None
) -> list[dict[str, Any]]:
    """Replay one trace on each of some fleets, which differ in nothing that a trace depends on."""
    count = fleets[0].engines
    repeats = 1 if read else max(1, round(LEAST / count))
    runs: list[list[Totals]] = [[] for _ in fleets]
    for one in range(seed, seed + repeats):
        given = read or arrivals(
            make_trace(name, one, units * count // (scale := SCALE.get(name, 1) * count), scale),
            fleets[0], one,
        )  # fmt: skip
        for fleet, found in zip(fleets, runs, strict=True):
            found.append(Run(fleet, costs, given, len(given) // 2, one).run())
    return [row_of(name, fleet, found) for fleet, found in zip(fleets, runs, strict=True)]


def variants(name: str, fleet: Fleet) -> Iterator[Fleet]:
    """Without the store, with it, and with blending where it would find anything."""
    yield replace(fleet, store=False)
    yield fleet
    if name == "documents":
        yield replace(fleet, blend=True)


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The store must not make prompts dearer or first tokens later, whatever the trace."""
    found = []
    for row in rows:
        if row["store"] != "no":
            [bare] = [
                one for one in rows
                if (one["trace"], one["engines"], one["store"])
                == (row["trace"], row["engines"], "no")
            ]  # fmt: skip
            name = f"{row['trace']}, {row['engines']} engines, store {row['store']}"
            ratio = row["ttft_p50"] / bare["ttft_p50"]
            found.append(Bar(f"{name}: median ms to the first token / without", ratio, 1.02, "<="))
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="10 and 30 engines, shorter traces")
    parser.add_argument("--engines", type=int, nargs="+", help=f"how many: {ENGINES}")
    parser.add_argument("--traces", nargs="+", choices=TRACES, default=TRACES)
    parser.add_argument("--trace-file", type=Path, help="replay this one instead")
    parser.add_argument("--requests", type=int, default=5000, help="of the file, at most")
    parser.add_argument("--seed", type=int, default=0)
    for one in ASSUMED:
        parser.add_argument(
            f"--{one.name.replace('_', '-')}", type=KINDS[str(one.type)], default=one.default,
            help=f"{one.metadata['told']} ({one.default})",
        )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = make_parser()
    args = parser.parse_args(argv)
    counts = args.engines or (ENGINES[:2] if args.quick else ENGINES)
    units = UNITS // 4 if args.quick else UNITS
    names, read = args.traces, None
    assumed = {one.name: getattr(args, one.name) for one in ASSUMED}
    if args.trace_file:
        try:
            read = read_trace(args.trace_file, args.requests)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        names = [args.trace_file.stem]
    unit_tokens = FILE_TOKENS if read else Fleet.unit_tokens
    try:
        fleets = [Fleet(engines=count, unit_tokens=unit_tokens, **assumed) for count in counts]
    except ValueError as error:
        parser.error(str(error))
    costs, rows = measured(), []
    for name in names:
        for fleet in fleets:
            compared = list(variants(name, fleet))
            rows += simulate(name, compared, costs, args.seed, units, read)
            print(f"{name}, {fleet.engines} engines", file=sys.stderr)
    report("Scale: a simulation", rows, bars(rows), args)


if __name__ == "__main__":
    main()
