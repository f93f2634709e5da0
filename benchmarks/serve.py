"""How fast chunks go over the network, beside sockets that do nothing else and beside others.

``python -m benchmarks.serve [--json] [--check] [--quick] [--peer redis] [--peer lmcache]``

GB/s, and p50 and p99 of one call in ms, of get (one chunk a call; and eight, as for a prompt) and
put of chunks of 1 MiB and 8 MiB, by 1, 8 and 64 clients: over TCP, over a unix socket, in shared
memory (``dir:``), beside a loop over bare TCP sockets, memcpy, and the peers. Clients are
processes; 64 are eight of them with eight threads, all with connections of their own. LMCache is
asked for 64 MiB at once at most: its server answers in turn, and its client waits 10 s. Then match
of 512 keys, and the memory of a server with 64 slow clients (`serve_memory`).

Variants alternate within each round, in an order that rotates. Gets of this store are compared with
their checksums, byte for byte; the others compare nothing. The store has no disk: what is measured
is the way there. Owns a folder under ``--dir`` and one under ``--memory-dir``, removed at the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from benchmarks import lmcache_peer
from benchmarks.serve_memory import memory_rows
from benchmarks.serve_processes import Clients, child, line_of
from benchmarks.serve_redis import found_server
from benchmarks.serve_tasks import CALL_CHUNKS
from benchmarks.server_process import ServerProcess
from benchmarks.table import Bar, add_arguments, report

PEERS = ("redis", "lmcache")
SIZES_KIB = (1024, 8192)
CLIENTS = (1, 8, 64)
CASES = ("get", "get of 8", "put")
MATCH, MATCH_KIB = "match", 128
DATA_MIB, CLIENT_MIB = 256, 64  # what all clients get, and each at most
CALLS_MIB, LMCACHE_MIB = 512, 64  # of all calls that are under way at once
OURS = ("tcp", "unix socket", "shared memory")
Key = tuple[str, int, int, str]  # case, KiB, clients, variant
Row = dict[str, object]


class Measured:
    """GB/s of each round, and the seconds of all calls."""

    def __init__(self) -> None:
        self.rates: dict[Key, list[float]] = {}
        self.calls: dict[Key, list[float]] = {}

    def add(self, key: Key, rate: float, calls: list[float]) -> None:
        """What one sample was."""
        self.rates.setdefault(key, []).append(rate)
        self.calls.setdefault(key, []).extend(calls)

    def share(self, case: str, kib: int, clients: int, one: str, other: str) -> float | None:
        """The median over rounds of how many times as fast one is as another."""
        found = self.rates.get((case, kib, clients, one))
        limit = self.rates.get((case, kib, clients, other))
        if not found or not limit:
            return None
        return statistics.median(a / b for a, b in zip(found, limit, strict=True))

    def p99_ms(self, key: Key) -> float | None:
        """Of one call."""
        calls = self.calls.get(key)
        return float(np.percentile(calls, 99)) * 1e3 if calls else None

    def rows(self) -> list[Row]:
        """``of_limit`` is the share of the bare loop, or of memcpy for what goes through memory."""
        rows: list[Row] = []
        for key, rates in self.rates.items():
            case, kib, clients, variant = key
            limit = "memcpy" if "mem" in variant else "bare socket"
            moves = case != MATCH
            rows.append(
                {"case": case, "kib": kib, "clients": clients, "variant": variant,
                 "gb_s": statistics.median(rates) if moves else None,
                 "of_limit": self.share(case, kib, clients, variant, limit) if moves else None,
                 "p50_ms": float(np.median(self.calls[key])) * 1e3, "p99_ms": self.p99_ms(key),
                 "calls": len(self.calls[key]), "mib": None, "mib_max": None}
            )  # fmt: skip
        return rows


class Place:
    """Folders and client processes of a run."""

    def __init__(self, stack: ExitStack, args: argparse.Namespace) -> None:
        Path(args.dir).mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory
        self.args = args
        self.folder = Path(stack.enter_context(made(prefix="pfx-", dir=args.dir)))
        self.memory_dir = Path(
            stack.enter_context(made(prefix="prefixstore-bench-", dir=args.memory_dir))
        )
        most = max(args.clients)
        self.clients = Clients(stack, most, sys.executable, "-m", "benchmarks.serve_client")
        self.redis = self.lmcache = ""
        if "redis" in args.peer:
            self.redis = found_server(args.redis_server)
        if "lmcache" in args.peer:
            self.lmcache = str(lmcache_peer.installed())
            self.lmcache_clients = Clients(
                stack, most, self.lmcache, "-m", "benchmarks.serve_lmcache"
            )

    @contextmanager
    def servers(self, name: str) -> Iterator[dict[str, str]]:
        """Servers with empty stores: address by variant."""
        args = self.args
        store, memory_dir = self.folder / name, self.memory_dir / name
        memory_dir.mkdir()
        with ExitStack() as stack:
            options = (f"--memory={args.memory}", "--disk=0", f"--memory-dir={memory_dir}")
            tcp = stack.enter_context(ServerProcess(store, *options))
            uds = f"--uds={self.folder}/{name}.s"
            unix = stack.enter_context(ServerProcess(store, *options, uds))
            bare = child(sys.executable, "-m", "benchmarks.serve_bare")
            port = line_of(stack.enter_context(bare))
            found = {
                "bare socket": f"bare:127.0.0.1:{port}", "tcp": tcp.url, "unix socket": unix.url,
                "memcpy": "memcpy:", "shared memory": f"dir:{store}",
            }  # fmt: skip
            if self.redis:
                words = ("-m", "benchmarks.serve_redis", self.redis)
                one = child(sys.executable, *words, str(args.peer_gib << 30))
                port = line_of(stack.enter_context(one))
                found["redis"] = f"redis:127.0.0.1:{port}"
            if self.lmcache:
                own = ("-m", "benchmarks.lmcache_server", str(self.folder / "lmcache.log"))
                one = child(self.lmcache, *own, "--l1-size-gb", str(args.peer_gib))
                port = line_of(stack.enter_context(one))
                found["lmcache tcp"] = f"lmcache:engine_driven:{port}"
                found["lmcache shared memory"] = f"lmcache:lmcache_driven:{port}"
            yield found

    def compare(
        self, found: Measured, case: str, kib: int, clients: int, addresses: dict[str, str]
    ) -> None:
        """Measure a case: all variants, in turns."""
        each, args = CALL_CHUNKS[case], self.args
        chunks = max(each, min(CLIENT_MIB, DATA_MIB // clients) * 1024 // kib)
        by = {name: self.lmcache_clients if "lmcache" in name else self.clients
              for name in addresses}  # fmt: skip
        for name, address in addresses.items():
            task = {"address": address, "op": case, "kib": kib, "chunks": chunks}
            by[name].open(name, clients, **task)
        names = list(addresses)
        for turn in range(args.rounds):
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                rate, calls = by[name].run(name, clients, args.seconds)
                found.add((case, kib, clients, name), rate * each * kib * 1024 / 1e9, calls)
        for name in names:
            by[name].close(name, clients)
        for row in found.rows()[-len(names) :]:
            print(*row.values(), file=sys.stderr, flush=True)


def measure(args: argparse.Namespace) -> tuple[Measured, list[Row]]:
    """Everything; the rows are those of the server's memory."""
    found = Measured()
    with ExitStack() as stack:
        place = Place(stack, args)
        with place.servers("match") as addresses:
            asked = {name: addresses[name] for name in OURS}
            place.compare(found, MATCH, MATCH_KIB, 1, asked)
        for kib in args.sizes:
            with place.servers(str(kib)) as addresses:
                for clients in args.clients:
                    for case in CASES:
                        mib = clients * CALL_CHUNKS[case] * kib >> 10  # under way at once
                        asked = {name: where for name, where in addresses.items()
                                 if "lmcache" not in name or mib <= LMCACHE_MIB}  # fmt: skip
                        if mib <= CALLS_MIB:
                            place.compare(found, case, kib, clients, asked)
        options = (f"--memory={args.memory}", "--disk=0", f"--memory-dir={place.memory_dir}")
        rows = memory_rows(place.folder / "slow", place.memory_dir, options, args.slow_seconds)
    return found, rows


def bars(found: Measured, memory: list[Row], peers: Sequence[str]) -> list[Bar]:
    """What must be reached."""
    made = []
    for kib in SIZES_KIB:
        size = f"{kib // 1024} MiB"
        for case in ("get", "get of 8"):
            share = found.share(case, kib, 1, "tcp", "bare socket")
            made.append(Bar(f"tcp {case} / bare socket loop, {size}", share, 0.6, ">="))
            share = found.share(case, kib, 1, "shared memory", "memcpy")
            made.append(Bar(f"shared memory {case} / memcpy, {size}", share, 0.7, ">="))
            for peer in [name for name in ("redis", "lmcache tcp") if name.split()[0] in peers]:
                share = found.share(case, kib, 1, "tcp", peer)
                made.append(Bar(f"tcp {case} / {peer}, {size}", share, 1.0, ">"))
    p99 = found.p99_ms((MATCH, MATCH_KIB, 1, "unix socket"))
    made.append(Bar("p99 ms to match 512 keys over the unix socket", p99, 2.0, "<="))
    for row in memory:
        share = _ratio(row["mib"], row["mib_max"])
        made.append(Bar(f"server's memory / its bound: {row['case']}", share, 1.0, "<="))
    return made


def _ratio(one: object, other: object) -> float | None:
    if not isinstance(one, float) or not isinstance(other, float):
        return None
    return one / other


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its bars mean nothing")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the store is made")
    parser.add_argument("--memory", default="2GiB", help="its memory tier")
    parser.add_argument("--memory-dir", default="/dev/shm", help="where that lies")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, help="how many")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each variant")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each sample")
    parser.add_argument("--peer", choices=PEERS, action="append", default=[], help="measure it too")
    parser.add_argument("--redis-server", default="redis-server", help="the program")
    parser.add_argument("--peer-gib", type=int, default=2, help="memory of each peer's server")
    args = parser.parse_args(argv)
    args.sizes, args.slow_seconds = SIZES_KIB, 20.0
    if args.quick:
        args.clients, args.sizes, args.rounds, args.seconds = (2,), SIZES_KIB[:1], 1, 0.1
        args.slow_seconds = 0.3
    load = os.getloadavg()[0]
    found, memory = measure(args)
    rows = found.rows() + memory
    made = [] if args.quick else bars(found, memory, args.peer)
    title = f"serve: chunks over the network; load average {load:.1f} before, "
    report(f"{title}{os.getloadavg()[0]:.1f} after", rows, made, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
