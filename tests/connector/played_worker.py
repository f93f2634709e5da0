"""A worker with pages of its own, to play with.

The pages are of a stand-in attention backend that puts K and V side by side, so what a chunk must
hold is read off the tensors directly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from connector.handle import StoreHandle
from connector.messages import LoadJob, SaveJob, StepMetadata
from connector.options import EngineOptions
from connector.pages import PageMap
from connector.rank import Rank
from connector.worker_side import WorkerSide
from prefixstore import Layout, Roi, Store
from prefixstore.codec.rounded import rounded_layout
from prefixstore.keys import ChunkRef
from prefixstore.testing_data import identity_for
from tests.store_helpers import wait_for

LAYERS, HEADS, DIM, BLOCK, CHUNK, BLOCKS = 3, 4, 8, 4, 8, 32
LAYOUT = Layout(LAYERS, 2, HEADS, CHUNK, DIM * 4)
IDENTITY = identity_for("model", LAYOUT)
DEADLINE_S = 10.0
STALL_S = 0.2
STAGED_CHUNKS = 4


class SideBySide:
    """A backend whose pages hold K, then V, of each token."""

    kv_cache_dtype = "auto"

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:  # fmt: skip
        for i, slot in enumerate(slots.tolist()):
            kv[slot // BLOCK][:, slot % BLOCK] = torch.cat((key[i], value[i]), dim=-1)


class Worker:
    """A worker with heads ``[first, stop)`` and pages of random numbers."""

    def __init__(
        self, options: EngineOptions, first: int = 0, stop: int = HEADS, *, group: int = 1,
        saves: bool = True,
    ) -> None:  # fmt: skip
        heads = stop - first
        self.kv = [torch.randn(BLOCKS, heads, BLOCK, 2 * DIM) for _ in range(LAYERS)]
        layer = SimpleNamespace(impl=SideBySide())
        pages = [PageMap.probe(layer, kv, heads, DIM, torch.float32).bind(kv) for kv in self.kv]
        self.layout = rounded_layout(options.codec, LAYOUT, "float32")
        roi = Roi(0, LAYERS, first, stop)
        self.rank = Rank(pages, self.layout, roi, group, saves, codec=options.codec)
        self.handle = StoreHandle(options)
        self.side = WorkerSide(options, self.handle, self.rank, BLOCKS * BLOCK)

    @property
    def store(self) -> Store:
        store = self.handle.get()
        assert isinstance(store, Store)
        return store

    def canonical(self, blocks: Sequence[int]) -> bytes:
        """What the chunk in these blocks is: [layer][K|V][head][token][dim]."""
        chunk = torch.stack([torch.cat([kv[b] for b in blocks], dim=1) for kv in self.kv])
        planes = torch.stack((chunk[..., :DIM], chunk[..., DIM:]), dim=1)
        return planes.contiguous().numpy().tobytes()

    def save(self, refs: list[ChunkRef], blocks: list[list[int]]) -> None:
        job = SaveJob("r", IDENTITY.namespace, refs, blocks, None, "", False, False)
        self.side.save(StepMetadata(saves=[job]))

    def start_load(
        self, refs: list[ChunkRef], blocks: list[list[int]], skip: int = 0, name: str = "r",
        namespace: bytes = IDENTITY.namespace,
    ) -> None:  # fmt: skip
        job = LoadJob(name, namespace, refs, blocks, skip, STALL_S)
        self.side.start_loads(StepMetadata(loads=[job]))

    def load(self, refs: list[ChunkRef], blocks: list[list[int]], skip: int = 0) -> set[int]:
        """Load and wait; returns the blocks that failed."""
        self.start_load(refs, blocks, skip)
        self.finish()
        return self.side.loader.failed_blocks()

    def finish(self, name: str = "r") -> None:
        """Wait until that load, and no other, has ended."""
        end = time.monotonic() + DEADLINE_S
        while not (done := self.side.loader.finished(idle=True)):
            assert time.monotonic() < end, "the load does not end"
        assert done == {name}

    def counted(self) -> dict[str, int]:
        return self.side.take_stats()[0]

    def close(self) -> None:
        self.side.close()
        self.handle.close()


def refs_of(worker: Worker, count: int, seed: int = 0) -> list[ChunkRef]:
    tokens = [seed, *range(1, count * CHUNK)]
    return worker.store.namespace(IDENTITY, worker.layout).chain(tokens).refs()


def stored(worker: Worker, refs: list[ChunkRef]) -> list[bytes]:
    """What the store gives for these, once it has them all."""
    namespace = worker.store.namespace(IDENTITY, worker.layout)
    end = time.monotonic() + DEADLINE_S
    while namespace.match(refs).num_chunks < len(refs):
        assert time.monotonic() < end, "not stored"
        time.sleep(0.005)
    outs = [bytearray(worker.layout.payload_bytes) for _ in refs]
    assert all(namespace.get(refs, [memoryview(out) for out in outs]))
    return [bytes(out) for out in outs]


def save_all(worker: Worker, refs: list[ChunkRef], blocks: list[list[int]]) -> None:
    """Have chunks stored, and what that counts behind it."""
    worker.save(refs, blocks)
    stored(worker, refs)
    wait_for(lambda: worker.side.saver.seconds, "the saving thread to have counted")
    worker.counted()


def snapshot(worker: Worker) -> list[torch.Tensor]:
    return [kv.clone() for kv in worker.kv]


def untouched(worker: Worker, before: list[torch.Tensor], but: Sequence[int] = ()) -> bool:
    rest = [block for block in range(BLOCKS) if block not in but]
    return all(torch.equal(kv[rest], old[rest]) for kv, old in zip(worker.kv, before, strict=True))


class Stuck:
    """A store's namespace that does not answer until told to; then it gives 0xff."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()

    def get(self, refs: Any, outs: Sequence[memoryview], *_: Any, **__: Any) -> list[int]:
        self.entered.set()
        assert self.release.wait(2 * DEADLINE_S)
        for out in outs:
            out[:] = b"\xff" * len(out)
        return [1] * len(outs)

    def put(self, refs: Sequence[Any], *_: Any, **__: Any) -> list[Any]:
        self.entered.set()
        assert self.release.wait(2 * DEADLINE_S)
        return [None] * len(refs)
