"""Stages of `benchmarks.roofline` that every machine has: the host's memory, its hash, its disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from benchmarks.roofline_rows import BYTES, Limit, Stage
from benchmarks.store_peers import Bytes, aligned
from benchmarks.store_sizes import (
    LAYOUTS,
    Action,
    Samples,
    Size,
    Target,
    alternate,
    nothing,
    temporary_store,
)
from benchmarks.table import spread
from prefixstore import admin
from prefixstore.ledger import MEMORY
from prefixstore.reading import helpers_for, share_out
from prefixstore.store import Store

PAYLOAD_KIB = 8192  # of Llama-3.1-8B: 64 tokens of 128 KiB
RAW_FILE, OURS = "one file, 4 threads, unchecked", "prefixstore"
COPY, SCAN, HASH, PUT, GET = "copy", "scan", "hash", "put", "get"


def host_stages(folder: Path, num_bytes: int, rounds: int, kib: int = PAYLOAD_KIB) -> list[Stage]:
    """Everything; ``num_bytes`` are moved by each."""
    source, target = aligned(num_bytes), aligned(num_bytes)
    words = source.view(np.uint64)
    words[:] = np.random.default_rng(0).integers(0, 2**64, len(words), dtype=np.uint64)
    size = Size(folder, kib, source, target, rounds)
    warm, cold = size.disk_get()
    return [
        *_memory(folder, size, rounds),
        *(
            _stage(f"disk tier to host, {what}", size.num_bytes, samples[OURS],
                   _limit(f"pread of one file, {what}, 4 threads", samples[RAW_FILE]))
            for what, samples in (("page cache", warm), ("not in page cache", cold))
        ),
    ]  # fmt: skip


def _memory(folder: Path, size: Size, rounds: int) -> list[Stage]:
    """The memory tier and the host's hash, beside a copy and a scan by as many threads."""
    room = 2 * len(size.values) * LAYOUTS[size.kib].slot_bytes + (64 << 20)
    with temporary_store(folder / "roofline-store", room, 0) as store:
        target = Target(store, size.layout, size.values)
        everything = admin.Selection(everything=True)
        actions: dict[str, tuple[Action, Action]] = {
            PUT: (lambda: _remove(store, everything), target.put),
            GET: (nothing, lambda: target.get(size.outs, MEMORY)),
            COPY: (nothing, lambda: _copy(store, size.values, size.outs)),
            HASH: (nothing, lambda: _hash(store, size.values)),
            SCAN: (nothing, lambda: _scan(store, size.values)),
        }
        alternate(actions, 1, size.num_bytes)  # maps the pages
        samples: Samples = alternate(actions, rounds, size.num_bytes)
    threads = 1 + helpers_for(size.num_bytes)
    copy = _limit(f"memcpy, {threads} threads", samples[COPY])
    scan = _limit(f"bytes read and added up, {threads} threads", samples[SCAN])
    parts = {name: size.num_bytes / spread(samples[name])["median"] / 1e6 for name in (COPY, HASH)}
    return [
        _stage("host to memory tier, hashed (put)", size.num_bytes, samples[PUT], copy, parts),
        _stage("memory tier to host, checked (get)", size.num_bytes, samples[GET], copy, parts),
        _stage("xxh3_64 on the host", size.num_bytes, samples[HASH], scan),
    ]


def _remove(store: Store, chosen: admin.Selection) -> None:
    admin.remove(store, chosen)


def _copy(store: Store, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
    def copy(number: int) -> None:
        np.copyto(targets[number], sources[number])

    share_out(len(sources), copy, store.helpers, helpers_for(sum(map(len, sources))))


def _hash(store: Store, values: Sequence[Bytes]) -> None:
    def digest(number: int) -> None:
        xxhash.xxh3_64_intdigest(values[number].data)

    share_out(len(values), digest, store.helpers, helpers_for(sum(map(len, values))))


def _scan(store: Store, values: Sequence[Bytes]) -> None:
    def add_up(number: int) -> None:
        values[number].view(np.uint64).sum()

    share_out(len(values), add_up, store.helpers, helpers_for(sum(map(len, values))))


def _limit(name: str, rates: Sequence[float]) -> Limit:
    return Limit(name, BYTES, spread(rates)["median"])


def _stage(
    name: str,
    num_bytes: int,
    rates: Sequence[float],
    limit: Limit,
    parts: Mapping[str, float] | None = None,
) -> Stage:
    ms = [num_bytes / rate / 1e6 for rate in rates]
    return Stage(name, num_bytes, 0.0, ms, limit, parts=parts)
