"""How fast is a pool, beside the client that its engine comes with?

    python -m benchmarks.pool [--engine redis --engine mooncake ..] [--check] [--json]

Starts each engine's real server on this machine. One table: for chunks of 1 and 8 MiB, what a
prompt's chunks take to be put and got (GB/s), one chunk to be got and a prompt of 32,000 tokens to
be looked up (ms), by us and by the engine's own client with the same bytes, in turns. Ours are cut,
summed and compared, theirs are taken as they come. Each ratio has a bar of 0.8.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np

from benchmarks.pool_clients import (
    Client,
    MooncakeClient,
    ObstoreClient,
    RedisPyClient,
    RedisPyClusterClient,
)
from benchmarks.pool_servers import NotInstalledError, mooncake, redis, redis_cluster, s3
from benchmarks.store_peers import Bytes, aligned
from benchmarks.store_sizes import LAYOUTS, identity_for
from benchmarks.table import Bar, add_arguments, report, spread
from prefixstore.found import REMOTE
from prefixstore.keys import ChunkRef
from prefixstore.pool.backend import open_backend
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState

RATIO_MIN = 0.8
PROMPT_BYTES = 64 << 20  # of KV in one put or get
LOOKED_UP = 500  # chunks of the prompt that is looked up: 32,000 tokens
ENGINES = ("redis", "redis-cluster", "mooncake", "s3")
Row = dict[str, object]
Work = Callable[[], object]


@contextmanager
def engine(name: str, *buffers: Bytes) -> Iterator[tuple[str, Callable[[], Client]]]:
    """The URL of a server that runs, and what makes its own client, which moves those buffers.
    Raises NotInstalledError."""
    if name == "redis":
        with redis() as server:
            yield server.url, partial(RedisPyClient, server.port)
    elif name == "redis-cluster":
        with redis_cluster() as nodes:
            yield nodes[0].url, partial(RedisPyClusterClient, nodes[0].port)
    elif name == "mooncake":
        with mooncake() as pool:
            yield pool.url, partial(MooncakeClient, pool.url, *buffers)
    else:
        with s3() as store:
            yield store.url, partial(ObstoreClient, store.url)


class Pair:
    """The same chunks, by us and by the engine's own client."""

    def __init__(self, url: str, client: Client, kib: int, source: Bytes, target: Bytes) -> None:
        self.kib, self.client, layout = kib, client, LAYOUTS[kib]
        self.store = PooledStore(open_backend(url), deadline_s=60.0)
        self.ns: PooledNamespace = self.store.namespace(identity_for(layout), layout)
        size = layout.payload_bytes
        self.values = [source[at : at + size].data for at in range(0, len(source), size)]
        self.outs = [target[at : at + size].data for at in range(0, len(target), size)]
        tokens = np.arange(len(self.values) * layout.chunk_tokens, dtype=np.int32)
        self.refs: list[ChunkRef] = self.ns.chain(tokens).refs()
        self.names = [f"theirs/{ref.key.hex()}" for ref in self.refs]
        long = np.arange(LOOKED_UP * layout.chunk_tokens, dtype=np.int32)
        self.long = self.ns.chain(long)
        self.long_names = [f"theirs/{key.hex()}" for key in self.long.keys]

    def put_ours(self) -> None:
        """All chunks. RuntimeError if one was not stored."""
        if set(self.ns.put(self.refs, self.values, deadline_s=60.0)) != {PutState.STORED}:
            raise RuntimeError("a put did not store all chunks")

    def get_ours(self, count: int) -> None:
        """The first chunks. RuntimeError if one is missing."""
        if self.ns.get(self.refs[:count], self.outs[:count]) != [REMOTE] * count:
            raise RuntimeError("a get did not give all chunks")

    def match_ours(self) -> None:
        """How many of the prompt that is looked up are there: all that were put."""
        found = self.ns.match(self.long).num_chunks
        if found != min(len(self.refs), LOOKED_UP):
            raise RuntimeError(f"a match found {found} chunks")

    def check(self) -> None:
        """Every byte of the last get. RuntimeError."""
        for value, out in zip(self.values, self.outs, strict=True):
            if value != out:
                raise RuntimeError("wrong bytes")
            out[:] = bytes(len(out))


def timed(work: Work) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(pair: Pair, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of us and of them, by what is done."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    count = len(pair.refs)

    def note(
        what: str, ours: Callable[[], object], theirs: Callable[[], object], turn: int
    ) -> None:
        mine, others = found.setdefault(what, ([], []))
        for kept, work in ((mine, ours), (others, theirs))[:: 1 if turn % 2 else -1]:
            kept.append(timed(work))

    for turn in range(rounds + 1):
        if turn == 1:
            found.clear()  # the first warms connections and memory
        pair.ns.delete(pair.refs)
        pair.client.delete(pair.names)
        note("put", pair.put_ours, lambda: pair.client.put(pair.names, pair.values), turn)
        note("get", lambda: pair.get_ours(count),
             lambda: pair.client.get(pair.names, pair.outs), turn)  # fmt: skip
        for _ in range(5):
            note("get of one", lambda: pair.get_ours(1),
                 lambda: pair.client.get(pair.names[:1], pair.outs[:1]), turn)  # fmt: skip
            note("look-up", pair.match_ours, lambda: pair.client.exist(pair.long_names), turn)
    pair.get_ours(count)
    pair.check()
    return found


def rows_of(
    name: str, pair: Pair, found: dict[str, tuple[list[float], list[float]]]
) -> Iterator[Row]:
    """What is printed of one engine and size."""
    num_bytes = sum(len(value) for value in pair.values)
    for what, (ours, theirs) in found.items():
        mine, others = spread(ours)["median"], spread(theirs)["median"]
        in_gb = what in ("put", "get")

        def scale(seconds: float, in_gb: bool = in_gb) -> float:
            return num_bytes / seconds / 1e9 if in_gb else 1000 * seconds

        yield {
            "engine": name, "chunk_kib": pair.kib, "what": what, "unit": "GB/s" if in_gb else "ms",
            "ours": scale(mine), "theirs": scale(others), "ratio": others / mine,
            "our_worst": scale(max(ours)), "n": len(ours), "client": pair.client.name,
        }  # fmt: skip


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """At least so much of what the engine's own client does."""
    return [
        Bar(f"{row['engine']}, {row['chunk_kib']} KiB, {row['what']}: of {row['client']}",
            float(str(row["ratio"])), RATIO_MIN, ">=")
        for row in rows
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """See the module docstring."""
    parser = add_arguments(argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]))
    parser.add_argument("--engine", action="append", choices=ENGINES, help="(all)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a moment's work, to see it run")
    args = parser.parse_args(argv)
    size = PROMPT_BYTES // 8 if args.quick else PROMPT_BYTES
    source, target = aligned(size), aligned(size)
    source[:] = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    rows: list[Row] = []
    for name in args.engine or ENGINES:
        for kib in (1024, 8192):
            with ExitStack() as stack:
                try:
                    url, make = stack.enter_context(engine(name, source, target))
                except NotInstalledError as error:
                    print(f"left out: {name}: {error}", file=sys.stderr)
                    break
                client = make()
                stack.callback(client.close)
                pair = Pair(url, client, kib, source, target)
                stack.callback(pair.store.close)
                rows += rows_of(name, pair, measure(pair, 1 if args.quick else args.rounds))
    title = f"A pool beside its engine's own client, {size >> 20} MiB of KV a prompt"
    report(title, rows, [] if args.quick else bars_of(rows), args)


if __name__ == "__main__":
    main()
