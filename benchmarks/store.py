"""How fast the store moves chunks and finds prefixes, beside the best this machine could do.

``python -m benchmarks.store [--json] [--check] [--quick] [--peer lmcache] [--dir FOLDER]``

GB/s of put and get for payloads of 128 KiB, 1 MiB and 8 MiB: memory tier beside memcpy over the
same buffers; disk tier with warm and cold page cache, and durable put (put, then flush), beside one
sequential file with one fsync, one file a value, raw LMDB values, and LMCache's own L2 benchmark.
Then the time to find a prompt of 4k, 32k and 128k tokens among 100,000 chunks.

One sample is one pass over the whole data set, larger than any CPU cache.  The variants of a
comparison alternate within each round and their order rotates, so that drift hits all alike.
Owns a folder under ``--dir`` (and the store's own one in shared memory), removed at the end; a
crash leaves ``prefixstore-bench-*`` there.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.lmcache_peer import PEERS, l2_bandwidth
from benchmarks.store_match import LAYOUT, Times, match_times
from benchmarks.store_peers import aligned
from benchmarks.store_sizes import DIRECT, KIB, LAYOUTS, MIB, PARALLEL, VALUES_MAX, Row, Size, row
from benchmarks.table import Bar, add_arguments, report, spread

BAR_SIZES_KIB = (1024, 8192)
DEFAULT_DIR = Path(__file__).resolve().parents[1] / ".cache" / "bench"
PROGRESS = ("case", "variant", "unit", "median", "of_limit")
CASES = ("memory get", "memory put", "durable put", "disk get, page cache", "disk get, cold")


def match_rows(times: Times) -> list[Row]:
    """Latency in ms of finding a prompt."""
    rows = []
    for (tier, tokens, stage), seconds in times.items():
        values = [1e3 * value for value in seconds]
        p99 = float(np.percentile(values, 99, method="higher"))
        name = f"match {tokens // 1024}k tokens, {tier}"
        rows.append(row(name, stage, LAYOUT.payload_bytes // KIB, "ms", spread(values), p99=p99))
    return rows


def peer_rows(folder: Path, kib: int, num_bytes: int, rounds: int, limits: list[Row]) -> list[Row]:
    """LMCache's two file adapters, as shares of the limits measured for ours."""
    rows = []
    for adapter in ("fs", "fs_native"):
        found = l2_bandwidth(folder, adapter, kib * KIB, num_bytes, rounds)
        shutil.rmtree(folder / f"lmcache-{adapter}")
        for case, variant, operation in (
            ("durable put", f"LMCache {adapter} (no fsync)", "put"),
            ("disk get, page cache", f"LMCache {adapter}", "get"),
        ):
            best = next(
                entry["median"] for entry in limits
                if entry["case"] == case and entry["of_limit"] == 1.0
            )  # fmt: skip
            assert isinstance(best, float)
            share = found[operation]["median"] / best
            rows.append(row(case, variant, kib, "GB/s", found[operation], share=share))
    return rows


def bars(rows: list[Row], peer: str | None) -> list[Bar]:
    """What must be reached: for payloads of 1 MiB and 8 MiB, and for prompts of 32k tokens."""

    def value(case: str, variant: str, kib: int | None, name: str = "median") -> float | None:
        for entry in rows:
            if (entry["case"], entry["variant"]) == (case, variant) and kib in (
                None, entry["payload_kib"],
            ):  # fmt: skip
                found = entry[name]
                return float(found) if isinstance(found, int | float) else None
        return None

    made = []
    for kib in BAR_SIZES_KIB:
        size = f"{kib // 1024} MiB"
        share = value("memory get", "prefixstore", kib, "of_limit")
        made.append(Bar(f"memory get / memcpy, {size}", share, 0.7, ">="))
        share = value("durable put", "prefixstore", kib, "of_limit")
        made.append(Bar(f"durable put / one file with one fsync, {size}", share, 0.8, ">="))
        ours = value("disk get, cold", "prefixstore", kib)
        raw = [value("disk get, cold", name, kib) for name in ("one file", PARALLEL, DIRECT)]
        best = max(filter(None, raw), default=None)
        share = ours / best if ours is not None and best else None
        made.append(Bar(f"cold disk get / best way to read one file, {size}", share, 0.8, ">="))
        if peer == "lmcache":
            ours = value("disk get, page cache", "prefixstore", kib)
            theirs = value("disk get, page cache", "LMCache fs_native", kib)
            ratio = ours / theirs if ours is not None and theirs else None
            made.append(Bar(f"disk get / LMCache fs_native, {size}", ratio, 1.5, ">="))
    for tier in ("memory", "disk"):
        found = value(f"match 32k tokens, {tier}", "both", None, "p99")
        made.append(Bar(f"p99 ms to match 32k tokens, {tier}", found, 3.0, "<"))
    return made


def measure(args: argparse.Namespace) -> list[Row]:
    """All rows; ``--quick`` measures only enough to see that it works."""
    sizes = [128] if args.quick else list(LAYOUTS)
    num_bytes, rounds = (16 * MIB, 2) if args.quick else (args.data_mib * MIB, args.rounds)
    parent = Path(args.dir)
    parent.mkdir(parents=True, exist_ok=True)
    source, target = aligned(num_bytes), aligned(num_bytes)
    words = source.view(np.uint64)
    words[:] = np.random.default_rng(0).integers(0, 2**64, len(words), dtype=np.uint64)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="prefixstore-bench-", dir=parent) as name:
        folder = Path(name)
        for kib in sizes:
            print(f"payload {kib} KiB ...", file=sys.stderr, flush=True)
            size = Size(folder, kib, source, target, rounds)
            found = size.rows()
            if args.peer:
                found += peer_rows(folder, kib, size.num_bytes, rounds, found)
            for entry in found:  # so that a run that is stopped was not for nothing
                print(*(entry[name] for name in PROGRESS), file=sys.stderr, flush=True)
            rows += sorted(found, key=lambda entry: CASES.index(str(entry["case"])))
        print("match ...", file=sys.stderr, flush=True)
        rows += match_rows(match_times(folder / "match", quick=args.quick))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its bars mean nothing")
    parser.add_argument("--peer", choices=PEERS, help="measure this one too (installs it)")
    parser.add_argument("--dir", default=str(DEFAULT_DIR), help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each variant")
    parser.add_argument("--data-mib", type=int, default=512, help="size of the data set")
    args = parser.parse_args(argv)
    rows = measure(args)
    title = f"store: {args.data_mib} MiB or {VALUES_MAX} values a sample"
    if args.quick:
        title = "store: a quick run"
    report(title, rows, [] if args.quick else bars(rows, args.peer), args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
