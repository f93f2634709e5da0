"""The bandwidth measurements of `benchmarks.store` for one payload size.

Owns the stores and files it makes in the folder it is given; removes them, and the stores' memory
tiers, also when a measurement fails.  What must hold: every pass moves the whole data set; a read
that another tier served, a put that stored nothing, or a wrong byte ends the run.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.store_peers import (
    Bytes,
    LmdbValues,
    Medium,
    OneFile,
    PlainFiles,
    copy_all,
    drop_page_cache,
    fill_page_cache,
)
from benchmarks.table import spread
from prefixstore import Layout, ModelIdentity, PutState, Store, admin
from prefixstore.keys import ChunkRef
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import Namespace

KIB, MIB = 1 << 10, 1 << 20
LAYOUTS = {
    128: Layout(num_layers=2, num_planes=2, num_heads=4, chunk_tokens=64, head_bytes=128),
    1024: Layout(num_layers=4, num_planes=2, num_heads=8, chunk_tokens=64, head_bytes=256),
    8192: Layout(num_layers=32, num_planes=2, num_heads=8, chunk_tokens=64, head_bytes=256),
}
VALUES_MAX = 1024  # a sample; 128 MiB of the smallest, four times the L3 cache of most servers
CALL_CHUNKS = 32  # chunks of one put or get: a prompt of 2048 tokens
DEADLINE_S = 300.0
PARALLEL, DIRECT = "one file, 4 threads, unchecked", "one file, 4 threads, O_DIRECT, unchecked"

Row = dict[str, object]
Samples = dict[str, list[float]]
Action = Callable[[], None]


def identity_for(layout: Layout) -> ModelIdentity:
    """A model that has chunks of this layout."""
    return ModelIdentity(
        architecture="Benchmark", num_layers=layout.num_layers, num_kv_heads=layout.num_heads,
        head_size=layout.head_bytes // 2, rope="{}", attention="{}", weights="none",
        model_dtype="bfloat16", kv_dtype="bfloat16", chunk_tokens=layout.chunk_tokens,
    )  # fmt: skip


class Target:
    """One namespace of a store, put and read in calls of `CALL_CHUNKS` chunks."""

    def __init__(self, store: Store, layout: Layout, values: Sequence[Bytes]) -> None:
        self.store, self.layout, self.values = store, layout, values
        self.space: Namespace = store.namespace(identity_for(layout), layout)
        tokens = np.arange(len(values) * layout.chunk_tokens, dtype=np.int32)
        self.refs: list[ChunkRef] = self.space.chain(tokens).refs()

    def put(self) -> None:
        """Store every value; RuntimeError if one was not stored."""
        for at in range(0, len(self.refs), CALL_CHUNKS):
            part = slice(at, at + CALL_CHUNKS)
            states = self.space.put(self.refs[part], [value.data for value in self.values[part]])
            if any(state is not PutState.STORED for state in states):
                raise RuntimeError(f"a put gave {set(states)}; every chunk should be stored")

    def put_durable(self) -> None:
        """The same, and wait until all of it is on disk."""
        self.put()
        if not self.store.flush(DEADLINE_S):
            raise RuntimeError(f"the store did not flush within {DEADLINE_S:g} s")

    def get(self, outs: Sequence[Bytes], tier: int) -> None:
        """Read every value; RuntimeError if one came from another tier."""
        for at in range(0, len(self.refs), CALL_CHUNKS):
            part = slice(at, at + CALL_CHUNKS)
            tiers = self.space.get(self.refs[part], [out.data for out in outs[part]])
            if any(found != tier for found in tiers):
                raise RuntimeError(f"a get was served by tiers {set(tiers)}; all should be {tier}")


@contextmanager
def temporary_store(folder: Path, memory_bytes: int, disk_bytes: int) -> Iterator[Store]:
    """A new store that leaves neither its folder nor its memory tier behind."""
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        store = Store.open(folder, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
        stack.callback(shutil.rmtree, store.live_dir, ignore_errors=True)
        yield stack.enter_context(store)


def rate(work: Action, num_bytes: int) -> float:
    """GB/s (10^9 bytes) of one pass."""
    began = time.perf_counter()
    work()
    return num_bytes / (time.perf_counter() - began) / 1e9


def alternate(actions: dict[str, tuple[Action, Action]], rounds: int, num_bytes: int) -> Samples:
    """``rounds`` samples of each action, in an order that rotates; (before, timed) a variant."""
    samples: Samples = {name: [] for name in actions}
    names = list(actions)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            before, timed = actions[name]
            before()
            samples[name].append(rate(timed, num_bytes))
    return samples


def nothing() -> None:
    """A variant that needs no preparation."""


class Size:
    """The measurements for one payload size."""

    def __init__(self, folder: Path, kib: int, source: Bytes, target: Bytes, rounds: int) -> None:
        self.folder, self.kib, self.rounds = folder, kib, rounds
        self.layout = LAYOUTS[kib]
        step = self.layout.payload_bytes
        self.num_bytes = min(len(source) // step, VALUES_MAX) * step
        self.values = [source[at : at + step] for at in range(0, self.num_bytes, step)]
        self.outs = [target[at : at + step] for at in range(0, self.num_bytes, step)]
        self.room = len(self.values) * self.layout.slot_bytes * 5 // 4 + 64 * MIB

    def rows(self) -> list[Row]:
        """Everything measured for this size."""
        rows = self._rows("memory get", "memcpy", self.memory_get())
        rows += self._rows("memory put", "memcpy", self.memory_put())
        rows += self._rows("durable put", "one file, one fsync", self.durable_put())
        warm, cold = self.disk_get()
        rows += self._rows("disk get, page cache", "one file", warm)
        return rows + self._rows("disk get, cold", "one file", cold)

    def _rows(self, case: str, limit: str, samples: Samples) -> list[Row]:
        best = spread(samples[limit])["median"]
        rows: list[Row] = []
        for variant, values in samples.items():
            found = spread(values)
            rows.append(row(case, variant, self.kib, "GB/s", found, share=found["median"] / best))
        return rows

    def memory_get(self) -> Samples:
        """Reads of chunks that are in memory, beside copies of the same values."""
        with self._memory_only() as target:
            target.put()
            actions = {
                "memcpy": (nothing, lambda: copy_all(self.values, self.outs)),
                "prefixstore": (nothing, lambda: target.get(self.outs, MEMORY)),
            }
            alternate(actions, 1, self.num_bytes)  # maps the pages of both
            self._check(target, MEMORY)
            return alternate(actions, self.rounds, self.num_bytes)

    def memory_put(self) -> Samples:
        """Writes into slots that are free and have memory behind them, beside copies."""
        with self._memory_only() as target:
            everything = admin.Selection(everything=True)
            actions = {
                "memcpy": (nothing, lambda: copy_all(self.values, self.outs)),
                "prefixstore": (lambda: _drop(target.store, everything), target.put),
            }
            alternate(actions, 1, self.num_bytes)
            return alternate(actions, self.rounds, self.num_bytes)

    @contextmanager
    def _memory_only(self) -> Iterator[Target]:
        with temporary_store(self.folder / "memory-store", self.room, 0) as store:
            yield Target(store, self.layout, self.values)

    def durable_put(self) -> Samples:
        """From the caller's buffer to the device, every time into new files."""
        media: dict[str, Medium] = {
            "one file, one fsync": OneFile(self.folder),
            "one file a value, fsync each": PlainFiles(self.folder),
            "raw LMDB values": LmdbValues(self.folder),
        }
        samples: Samples = {name: [] for name in [*media, "prefixstore"]}
        for turn in range(self.rounds):
            names = list(samples)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                os.sync()  # nobody pays for another's leftovers
                if name == "prefixstore":
                    samples[name].append(self._durable_store())
                    continue
                medium = media[name]
                samples[name].append(rate(partial(medium.write, self.values), self.num_bytes))
                medium.remove()
        return samples

    def _durable_store(self) -> float:
        with temporary_store(self.folder / "durable-store", self.room, self.room) as store:
            return rate(Target(store, self.layout, self.values).put_durable, self.num_bytes)

    def disk_get(self) -> tuple[Samples, Samples]:
        """Reads from disk with the file in the page cache, and without.

        A quota of 0 keeps chunks out of the memory tier, so that every round reads the disk.
        """
        one = OneFile(self.folder)
        media: dict[str, Medium] = {
            "one file": one,
            "one file a value": PlainFiles(self.folder),
            "raw LMDB values": LmdbValues(self.folder),
        }
        for medium in media.values():
            medium.write(self.values)
        folder = self.folder / "disk-store"
        with temporary_store(folder, self.room, self.room) as store:
            target = Target(store, self.layout, self.values)
            target.put_durable()
            admin.empty_memory(store, DEADLINE_S)
            store.quotas.set(MEMORY, 0, namespace=target.space.identity.namespace)
            reads: dict[str, Action] = {
                name: partial(medium.read, self.outs) for name, medium in media.items()
            }
            for name, direct in ((PARALLEL, False), (DIRECT, True)):
                reads[name] = partial(one.read_in_parallel, self.outs, direct=direct)
            reads["prefixstore"] = lambda: target.get(self.outs, DISK)
            self._check(target, DISK)
            fill_page_cache(folder.glob("*.slots"))  # which the store reads past
            warm = {name: (nothing, read) for name, read in reads.items() if name != DIRECT}
            alternate(warm, 1, self.num_bytes)
            warm_samples = alternate(warm, self.rounds, self.num_bytes)
            cool: dict[str, Action] = {name: medium.cool for name, medium in media.items()}
            cool[PARALLEL] = cool[DIRECT] = one.cool
            cool["prefixstore"] = lambda: drop_page_cache(folder.glob("*.slots"))
            cold = {name: (cool[name], read) for name, read in reads.items()}
            cold_samples = alternate(cold, self.rounds, self.num_bytes)
        for medium in media.values():
            medium.remove()
        return warm_samples, cold_samples

    def _check(self, target: Target, tier: int) -> None:
        """A fast wrong answer is no result."""
        for out in self.outs:
            out[:] = 0
        target.get(self.outs, tier)
        for value, out in zip(self.values, self.outs, strict=True):
            if not np.array_equal(value, out):
                raise RuntimeError("the store gave other bytes than were put")


def _drop(store: Store, chosen: admin.Selection) -> None:
    admin.remove(store, chosen)


def row(
    case: str,
    variant: str,
    kib: int | None,
    unit: str,
    found: dict[str, float],
    *,
    p99: float | None = None,
    share: float | None = None,
) -> Row:
    """One line of the table; ``share`` is of the case's limit."""
    return {
        "case": case, "variant": variant, "payload_kib": kib, "unit": unit,
        "median": found["median"], "min": found["min"], "max": found["max"], "p99": p99,
        "n": int(found["n"]), "of_limit": share,
    }  # fmt: skip
