"""The workers' half: pages to the store and back, and what happens when the store does not answer.

The pages are of a stand-in attention backend that puts K and V side by side, so what a chunk must
hold is read off the tensors directly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from connector import handle as handle_module
from connector.handle import StoreHandle
from connector.messages import LoadJob, SaveJob, StepMetadata
from connector.options import EngineOptions
from connector.pages import PageMap
from connector.rank import Rank
from connector.worker_side import WorkerSide
from prefixstore import Layout, Roi, Store
from prefixstore.keys import ChunkRef
from prefixstore.testing import identity_for

pytestmark = pytest.mark.timeout(60)

LAYERS, HEADS, DIM, BLOCK, CHUNK, BLOCKS = 3, 4, 8, 4, 8, 32
LAYOUT = Layout(LAYERS, 2, HEADS, CHUNK, DIM * 4)
IDENTITY = identity_for("model", LAYOUT)
DEADLINE_S = 10.0
STALL_S = 0.2


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
        self.rank = Rank(pages, LAYOUT, Roi(0, LAYERS, first, stop), group, saves)
        self.handle = StoreHandle(options)
        self.side = WorkerSide(options, self.handle, self.rank)

    @property
    def store(self) -> Store:
        store = self.handle.get()
        assert store is not None
        return store

    def canonical(self, blocks: Sequence[int]) -> bytes:
        """What the chunk in these blocks is: [layer][K|V][head][token][dim]."""
        chunk = torch.stack([torch.cat([kv[b] for b in blocks], dim=1) for kv in self.kv])
        planes = torch.stack((chunk[..., :DIM], chunk[..., DIM:]), dim=1)
        return planes.contiguous().numpy().tobytes()

    def save(self, refs: list[ChunkRef], blocks: list[list[int]]) -> None:
        job = SaveJob("r", IDENTITY.namespace, refs, blocks, None, "", False)
        self.side.save(StepMetadata(saves=[job]))

    def load(self, refs: list[ChunkRef], blocks: list[list[int]], skip: int = 0) -> set[int]:
        """Load and wait; returns the blocks that failed."""
        self.side.start_loads(
            StepMetadata(loads=[LoadJob("r", IDENTITY.namespace, refs, blocks, skip)])
        )
        self.finish()
        return self.side.loader.failed_blocks()

    def finish(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while not (done := self.side.loader.finished(idle=True)):
            assert time.monotonic() < end
        assert done == {"r"}

    def counted(self) -> dict[str, int]:
        return self.side.take_stats()[0]

    def close(self) -> None:
        self.side.close()
        self.handle.close()


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    memory = tmp_path / "memory"
    memory.mkdir()
    return EngineOptions(
        dir=str(tmp_path / "store"), memory="4MiB", disk="4MiB", memory_dir=str(memory),
        stall_ms=int(STALL_S * 1000), staging=4 * LAYOUT.payload_bytes,
    )  # fmt: skip


@pytest.fixture
def start(options: EngineOptions) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def make(*args: Any, **kwargs: Any) -> Worker:
        workers.append(Worker(options, *args, **kwargs))
        workers[-1].store.namespace(IDENTITY, LAYOUT)  # the scheduler's half registers it
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def refs_of(worker: Worker, count: int, seed: int = 0) -> list[ChunkRef]:
    tokens = [seed, *range(1, count * CHUNK)]
    return worker.store.namespace(IDENTITY, LAYOUT).chain(tokens).refs()


def stored(worker: Worker, refs: list[ChunkRef]) -> list[bytes]:
    """What the store gives for these, once it has them all."""
    namespace = worker.store.namespace(IDENTITY, LAYOUT)
    end = time.monotonic() + DEADLINE_S
    while namespace.match(refs).num_chunks < len(refs):
        assert time.monotonic() < end, "not stored"
        time.sleep(0.005)
    outs = [bytearray(LAYOUT.payload_bytes) for _ in refs]
    assert all(namespace.get(refs, [memoryview(out) for out in outs]))
    return [bytes(out) for out in outs]


def snapshot(worker: Worker) -> list[torch.Tensor]:
    return [kv.clone() for kv in worker.kv]


def untouched(worker: Worker, before: list[torch.Tensor], but: Sequence[int] = ()) -> bool:
    rest = [block for block in range(BLOCKS) if block not in but]
    return all(torch.equal(kv[rest], old[rest]) for kv, old in zip(worker.kv, before, strict=True))


def test_what_is_saved_is_what_the_pages_held(start: Callable[..., Worker]) -> None:
    worker = start()
    refs, blocks = refs_of(worker, 3), [[5, 9], [1, 30], [31, 2]]
    expected = [worker.canonical(row) for row in blocks]
    worker.save(refs, blocks)
    for kv in worker.kv:  # the engine reuses its pages at once
        kv.zero_()
    assert stored(worker, refs) == expected
    counts = worker.counted()
    assert counts["chunks_saved"] == 3
    assert counts["bytes_saved"] == 3 * LAYOUT.payload_bytes


@pytest.mark.parametrize("skip", [0, 1])
def test_what_is_loaded_fills_its_blocks_and_no_other(
    start: Callable[..., Worker], skip: int
) -> None:
    worker = start()
    refs, blocks = refs_of(worker, 2), [[3, 4], [6, 5]]
    expected = [worker.canonical(row) for row in blocks]
    worker.save(refs, blocks)
    stored(worker, refs)
    before, target = snapshot(worker), [[20, 21], [11, 10]]
    old_head = worker.canonical([20, 20])
    assert worker.load(refs, target, skip) == set()
    written = [block for row in target for block in row][skip:]
    assert untouched(worker, before, written)
    assert worker.canonical(target[1]) == expected[1]
    if skip:
        assert worker.canonical([20, 20]) == old_head
        assert worker.canonical([21, 21]) == worker.canonical([4, 4])
    else:
        assert worker.canonical(target[0]) == expected[0]
    counts, loads, _ = worker.side.take_stats()
    assert counts["bytes_loaded_1"] == 2 * LAYOUT.payload_bytes
    assert len(loads) == 1


def test_two_ranks_store_what_one_loads_and_back(start: Callable[..., Worker]) -> None:
    left, right, whole = start(0, 2), start(2, 4), start(group=2)
    refs, blocks = refs_of(whole, 2), [[1, 2], [3, 4]]
    left.save(refs, blocks)
    left.side.close()  # ranks of one process would find each other's chunks busy
    right.save(refs, blocks)
    stored(whole, refs)
    assert whole.load(refs, blocks) == set()
    for mine, first in ((left, 0), (right, 2)):
        for kv, part in zip(whole.kv, mine.kv, strict=True):
            assert torch.equal(kv[1:5, first : first + 2], part[1:5])
    again = refs_of(whole, 2, seed=1)
    whole.save(again, [[9, 8], [7, 6]])
    stored(whole, again)
    assert right.load(again, [[10, 11], [12, 13]]) == set()
    for kv, part in zip(whole.kv, right.kv, strict=True):
        assert torch.equal(part[10:14], kv[[9, 8, 7, 6], 2:])


def test_a_chunk_that_is_gone_fails_from_there_on(start: Callable[..., Worker]) -> None:
    worker = start()
    refs = refs_of(worker, 4)
    worker.save(refs[:2], [[1, 2], [3, 4]])
    stored(worker, refs[:2])
    before = snapshot(worker)
    assert worker.load(refs, [[10, 11], [12, 13], [14, 15], [16, 17]]) == {14, 15, 16, 17}
    assert untouched(worker, before, range(10, 14))
    assert worker.side.loader.failed_blocks() == set()
    assert worker.counted()["loads_failed"] == 1
    absent = refs_of(worker, 1, seed=7)
    assert worker.load(absent, [[20, 21]], skip=1) == {21}  # 20 is vLLM's own


def test_a_rank_with_a_copy_of_others_heads_does_not_save(start: Callable[..., Worker]) -> None:
    worker = start(saves=False)
    refs = refs_of(worker, 1)
    worker.save(refs, [[1, 2]])
    worker.side.close()
    assert worker.store.namespace(IDENTITY, LAYOUT).match(refs).num_chunks == 0


class Stuck:
    """A namespace that does not answer until told to; then it gives 0xff."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()

    def get(self, refs: Any, outs: Sequence[memoryview], *_: Any, **__: Any) -> list[int]:
        self.entered.set()
        assert self.release.wait(DEADLINE_S)
        for out in outs:
            out[:] = b"\xff" * len(out)
        return [1] * len(outs)

    def put(self, refs: Sequence[Any], *_: Any, **__: Any) -> list[Any]:
        self.entered.set()
        assert self.release.wait(DEADLINE_S)
        return [None] * len(refs)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    stuck = Stuck()
    monkeypatch.setattr(Rank, "namespace", lambda self, store, name: stuck)
    yield stuck
    stuck.release.set()


def test_a_late_answer_does_not_touch_the_pages(start: Callable[..., Worker], stuck: Stuck) -> None:
    worker = start()
    refs, before = refs_of(worker, 2), snapshot(worker)
    began = time.monotonic()
    failed = worker.load(refs, [[1, 2], [3, 4]])
    took_s = time.monotonic() - began
    assert failed == {1, 2, 3, 4}
    assert STALL_S <= took_s < DEADLINE_S / 2
    assert worker.handle.get() is None
    report = worker.side.report()
    assert report is not None
    assert report.stalled
    assert worker.side.report() is None
    stuck.release.set()
    worker.side.close()  # waits for the thread that was late
    assert untouched(worker, before)
    assert worker.side.loader.finished(idle=True) == set()
    counts = worker.counted()
    assert counts["loads_stalled"] == 1


def test_a_full_ring_drops_chunks_and_does_not_wait(
    start: Callable[..., Worker], stuck: Stuck
) -> None:
    worker = start()
    refs = refs_of(worker, 8)
    for ref in refs:
        worker.save([ref], [[1, 2]])  # four find room
    assert worker.counted()["save_dropped_chunks"] == 4
    assert stuck.entered.wait(DEADLINE_S)
    stuck.release.set()
    end = time.monotonic() + DEADLINE_S
    while True:  # room again, once what is staged is stored
        worker.save([refs[0]], [[1, 2]])
        if "save_dropped_chunks" not in worker.counted():
            break
        assert time.monotonic() < end


def test_without_a_store_loads_fail_and_saves_are_dropped(start: Callable[..., Worker]) -> None:
    worker = start()
    refs, before = refs_of(worker, 2), snapshot(worker)
    worker.handle.stalled("a test")
    assert worker.load(refs, [[1, 2], [3, 4]]) == {1, 2, 3, 4}
    assert untouched(worker, before)
    worker.save(refs, [[1, 2], [3, 4]])
    worker.side.close()
    assert worker.counted() == {"loads_failed": 1, "save_dropped_chunks": 2}


def test_a_load_that_ends_in_time_forgives_earlier_stalls(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the worker stays away for longer than the scheduler, which then promises in vain."""
    worker = start()
    refs = refs_of(worker, 1)
    worker.save(refs, [[1, 2]])
    stored(worker, refs)
    clock = SimpleNamespace(now=time.monotonic())
    monkeypatch.setattr(handle_module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def bypassed_s() -> float:
        began = clock.now
        worker.handle.stalled("a test")
        while worker.handle.get() is None:
            clock.now += 0.5
        return float(clock.now - began)

    first_s = bypassed_s()
    assert bypassed_s() > first_s
    assert worker.load(refs, [[3, 4]]) == set()
    assert bypassed_s() == first_s


def test_a_namespace_of_another_layout_is_a_failed_load(options: EngineOptions) -> None:
    worker = Worker(options)
    try:
        other = Layout(LAYERS, 2, HEADS, CHUNK, DIM * 8)
        namespace = worker.store.namespace(IDENTITY, other)
        refs = namespace.chain(range(CHUNK)).refs()
        namespace.put(refs, [bytes(other.payload_bytes)])
        assert worker.load(refs, [[1, 2]]) == {1, 2}
    finally:
        worker.close()


def test_closing_stores_what_is_staged(start: Callable[..., Worker]) -> None:
    worker = start()
    refs, blocks = refs_of(worker, 4), [[2 * i, 2 * i + 1] for i in range(4)]
    expected = [worker.canonical(row) for row in blocks]
    worker.save(refs, blocks)
    worker.side.close()
    assert stored(worker, refs) == expected
