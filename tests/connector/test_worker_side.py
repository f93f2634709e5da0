"""The workers' half: pages to the store and back, bit for bit, and what it counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch

from connector import handle as handle_module
from connector.messages import SaveJob, StepMetadata
from connector.saving import together
from prefixstore import Layout, admin
from prefixstore.testing_data import identity_for
from tests.connector.played_worker import (
    CHUNK,
    DIM,
    HEADS,
    IDENTITY,
    LAYERS,
    LAYOUT,
    STAGED_CHUNKS,
    Worker,
    refs_of,
    snapshot,
    stored,
    untouched,
)

pytestmark = pytest.mark.timeout(60)


def test_what_is_saved_is_what_the_pages_held(start: Callable[..., Worker]) -> None:
    worker = start()
    refs, blocks = refs_of(worker, 3), [[5, 9], [1, 30], [31, 2]]
    expected = [worker.canonical(row) for row in blocks]
    worker.save(refs, blocks)
    for kv in worker.kv:  # the engine reuses its pages at once
        kv.zero_()
    assert stored(worker, refs) == expected
    worker.side.close()  # the thread has counted by then
    counts = worker.counted()
    assert counts["chunks_saved"] == 3
    assert counts["bytes_saved"] == 3 * LAYOUT.payload_bytes


def test_what_several_requests_complete_is_saved_at_once(start: Callable[..., Worker]) -> None:
    worker = start()
    blocks = [[[5, 9]], [[1, 30]], [[31, 2]]]
    refs = [refs_of(worker, 1, seed) for seed in range(3)]
    jobs = [
        SaveJob(f"r{i}", IDENTITY.namespace, refs[i], blocks[i], None, tag, False, False)
        for i, tag in enumerate(["a", "b", "a"])
    ]
    assert [len(job.refs) for job in together(jobs)] == [2, 1]
    expected = [worker.canonical(row[0]) for row in blocks]
    worker.side.save(StepMetadata(saves=jobs))
    assert [stored(worker, one)[0] for one in refs] == expected
    worker.side.close()
    found = admin.list_chunks(worker.store, admin.Selection(tag=b"a"))
    assert {one.key for one in found} == {refs[0][0].key, refs[2][0].key}


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
    assert worker.side.loader.failed_requests() == {"r"}
    assert worker.side.loader.finished(idle=False) == set()
    assert worker.side.loader.failed_requests() == set(), "kept, where vLLM does not ask for them"
    assert worker.counted()["loads_failed"] == 1
    absent = refs_of(worker, 1, seed=7)
    assert worker.load(absent, [[20, 21]], skip=1) == {21}  # 20 is vLLM's own


def test_a_rank_with_a_copy_of_others_heads_does_not_save(start: Callable[..., Worker]) -> None:
    worker = start(saves=False)
    refs = refs_of(worker, 1)
    worker.save(refs, [[1, 2]])
    worker.side.close()
    assert worker.store.namespace(IDENTITY, LAYOUT).match(refs).num_chunks == 0
    assert worker.counted() == {}


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


def test_a_namespace_of_another_layout_is_a_failed_load(start: Callable[..., Worker]) -> None:
    worker = start()
    other = Layout(LAYERS, 2, HEADS, CHUNK, DIM * 8)
    identity = identity_for("another model", other)
    namespace = worker.store.namespace(identity, other)
    refs = namespace.chain(range(CHUNK)).refs()
    namespace.put(refs, [bytes(other.payload_bytes)])
    before = snapshot(worker)
    worker.start_load(refs, [[1, 2]], namespace=identity.namespace)
    worker.finish()
    assert worker.side.loader.failed_blocks() == {1, 2}
    assert untouched(worker, before)


def test_closing_stores_what_is_staged(start: Callable[..., Worker]) -> None:
    worker = start()
    refs, blocks = refs_of(worker, 4), [[2 * i, 2 * i + 1] for i in range(4)]
    expected = [worker.canonical(row) for row in blocks]
    worker.save(refs, blocks)
    worker.side.close()
    assert stored(worker, refs) == expected


def test_of_a_step_that_completes_too_much_the_first_chunks_are_saved(
    start: Callable[..., Worker],
) -> None:
    """The first: chunks behind one that is absent can never be loaded."""
    worker = start()
    count = STAGED_CHUNKS + 2
    refs, blocks = refs_of(worker, count), [[2 * i, 2 * i + 1] for i in range(count)]
    expected = [worker.canonical(row) for row in blocks]
    worker.save(refs, blocks)
    worker.side.close()
    assert stored(worker, refs[:STAGED_CHUNKS]) == expected[:STAGED_CHUNKS]
    assert worker.store.namespace(IDENTITY, LAYOUT).match(refs).num_chunks == STAGED_CHUNKS
    counts = worker.counted()
    assert counts["chunks_saved"] == STAGED_CHUNKS
    assert counts["save_dropped_chunks"] == 2


def test_ranks_count_a_chunk_once_and_each_its_bytes(start: Callable[..., Worker]) -> None:
    """The counters of all ranks are added up."""
    left, right = start(0, 2), start(2, 4)
    copy = start(0, 2, saves=False)
    ranks = (left, right, copy)
    staged = 2 * STAGED_CHUNKS  # half chunks
    refs, blocks = refs_of(left, staged + 1), [[1, 2]] * (staged + 1)
    left.save(refs, blocks)
    left.side.close()
    right.save(refs, blocks)
    copy.save(refs, blocks)
    stored(left, refs[:staged])
    for rank in ranks[1:]:
        assert rank.load(refs_of(rank, 1, seed=9), [[1, 2]]) == {1, 2}
        rank.side.close()
    counts = [rank.counted() for rank in ranks]
    half = staged * LAYOUT.payload_bytes // 2
    assert counts == [
        {"chunks_saved": staged, "save_dropped_chunks": 1, "bytes_saved": half},
        {"bytes_saved": half},
        {},
    ]


def test_a_step_that_was_made_before_the_news_does_not_wait(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An asynchronous scheduler has made the next step when it hears of them."""
    side, waited, ended = (
        start().side,
        list[bool](),
        [set(), {"r"}, *(set[str]() for _ in range(4))],
    )

    def finished(idle: bool) -> set[str]:
        waited.append(idle)
        return ended.pop(0)

    monkeypatch.setattr(side.loader, "finished", finished)
    for told in (False, False, False, True):
        side.finished(idle=True)
        side.loader.stalled = told
        assert (side.report() is not None) == told
    side.finished(idle=True)
    side.finished(idle=True)
    assert waited == [True, True, False, True, False, True]
