"""Loads that are ended because computing is faster: what is in the pages then, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from connector import bandwidth, load_work, loading
from connector import load as load_module
from connector.kept_speed import KeptSpeed
from connector.known import KnownNamespaces
from connector.messages import LoadJob, StepMetadata, WorkerReport
from connector.options import EngineOptions
from connector.scheduler_side import SchedulerSide
from tests.connector.played_scheduler import BLOCK, CHUNK, Played, prompt, saved
from tests.connector.played_scheduler import IDENTITY as OF_SCHEDULER
from tests.connector.played_scheduler import LAYOUT as LAYOUT_OF_SCHEDULER
from tests.connector.played_worker import (
    IDENTITY,
    LAYOUT,
    STALL_S,
    Worker,
    refs_of,
    save_all,
    snapshot,
    untouched,
)

pytestmark = pytest.mark.timeout(60)

COMPUTE_S = 0.25  # of a chunk
SAVED = [[0, 1], [2, 3], [4, 5], [6, 7]]
INTO = [[20, 21], [9, 8], [17, 23], [11, 30]]
MEMORY = 1


class Slow:
    """The namespace behind it, each chunk of which takes ``chunk_s`` of a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, chunk_s: float) -> None:
        self.chunk_s, self.now = chunk_s, 1000.0
        self.reads: list[int] = []
        real = KnownNamespaces.get

        def get(known: KnownNamespaces, store: Any, name: bytes) -> Any:
            self.namespace = real(known, store, name)
            return self

        monkeypatch.setattr(KnownNamespaces, "get", get)
        for module in (load_work, load_module):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def get(self, refs: Sequence[Any], *arguments: Any) -> list[int]:
        self.reads.append(len(refs))
        self.now += len(refs) * self.chunk_s
        tiers: list[int] = self.namespace.get(refs, *arguments)
        return tiers


def load(worker: Worker, refs: list[Any], compute_s: float) -> set[int]:
    """Load to INTO; the blocks that failed."""
    job = LoadJob("r", IDENTITY.namespace, refs, INTO, 0, STALL_S, compute_s=compute_s)
    worker.side.start_loads(StepMetadata(loads=[job]))
    worker.finish()
    return worker.side.loader.failed_blocks()


def with_chunks(start: Callable[..., Worker]) -> tuple[Worker, list[Any]]:
    """A worker that has stored what its blocks SAVED hold."""
    worker = start()
    refs = refs_of(worker, len(SAVED))
    save_all(worker, refs, SAVED)
    return worker, refs


def test_a_slow_load_ends_early_and_keeps_what_it_has(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, refs = with_chunks(start)
    before, expected = snapshot(worker), worker.canonical(SAVED[0])
    slow = Slow(monkeypatch, 4 * COMPUTE_S)
    assert load(worker, refs, COMPUTE_S) == {block for blocks in INTO[1:] for block in blocks}
    assert slow.reads == [1]
    assert worker.canonical(INTO[0]) == expected
    assert untouched(worker, before, INTO[0])
    report = worker.side.report()
    assert report is not None
    assert report.cut == {"r"}
    assert report.bandwidth == {MEMORY: LAYOUT.payload_bytes / (4 * COMPUTE_S)}  # a first load's
    assert not report.stalled
    assert worker.handle.get() is not None
    assert worker.counted() == {"bytes_loaded_1": LAYOUT.payload_bytes, "loads_cut": 1}
    assert worker.side.report() is None


@pytest.mark.parametrize(("chunk_s", "compute_s"), [(COMPUTE_S, COMPUTE_S), (COMPUTE_S, 0.0)])
def test_a_load_that_keeps_up_or_need_not_is_not_cut(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, chunk_s: float, compute_s: float
) -> None:
    worker, refs = with_chunks(start)
    expected = [worker.canonical(blocks) for blocks in SAVED]
    slow = Slow(monkeypatch, chunk_s)
    assert load(worker, refs, compute_s) == set()
    assert slow.reads == ([1, 2, 1] if compute_s else [4])
    assert [worker.canonical(blocks) for blocks in INTO] == expected
    assert "loads_cut" not in worker.counted()
    assert worker.side.report() is None


class Step:
    """What the engine does when a load begins: it may use the load's pages until it is over."""

    def __init__(self, worker: Worker, monkeypatch: pytest.MonkeyPatch, over: Callable[[], None]):
        self._worker, self._before, self._over = worker, snapshot(worker), over
        self.waited_for = 0
        monkeypatch.setattr(worker.rank, "mark", lambda behind=None: self)

    def synchronize(self) -> None:
        assert untouched(self._worker, self._before), "pages were written that a step may use"
        self.waited_for += 1
        self._over()


def test_waiting_for_the_engine_is_not_the_tiers_time(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, refs = with_chunks(start)
    expected = [worker.canonical(blocks) for blocks in SAVED]
    slow = Slow(monkeypatch, COMPUTE_S / 2)

    def over() -> None:
        slow.now += 100 * COMPUTE_S

    step = Step(worker, monkeypatch, over)
    assert load(worker, refs, COMPUTE_S) == set()
    assert step.waited_for == 1
    assert slow.reads == [1, 2, 1], "it was not ended for being slow"
    assert [worker.canonical(blocks) for blocks in INTO] == expected


def test_nor_does_it_count_for_what_the_tier_is_said_to_give(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_s = 0.5
    worker, refs = with_chunks(start)
    monkeypatch.setattr(bandwidth, "MEASURED_BYTES_MIN", 1)
    assert load(worker, refs, 0.0) == set()  # the first one is not counted
    step = Step(worker, monkeypatch, lambda: time.sleep(wait_s))
    assert load(worker, refs, 0.0) == set()
    assert worker.side.report() is None, "all of it may have come while it waited"
    monkeypatch.setattr(loading, "EARLY_SHARE", 0)
    step._before = snapshot(worker)
    assert load(worker, refs, 0.0) == set()
    assert step.waited_for == 2
    report = worker.side.report()
    assert report is not None
    assert report.bandwidth[MEMORY] > len(refs) * LAYOUT.payload_bytes / wait_s


def test_the_last_chunk_has_nothing_behind_it_to_compute(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, refs = with_chunks(start)
    slow = Slow(monkeypatch, 100 * COMPUTE_S)
    job = LoadJob("r", IDENTITY.namespace, refs[:1], INTO[:1], 0, STALL_S, compute_s=COMPUTE_S)
    worker.side.start_loads(StepMetadata(loads=[job]))
    worker.finish()
    assert worker.side.loader.failed_blocks() == set()
    assert slow.reads == [1]


def test_where_a_part_is_of_no_use_all_of_it_counts(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three of four chunks, one more is faster than computing four."""
    worker, refs = with_chunks(start)
    slow = Slow(monkeypatch, 2 * COMPUTE_S)
    assert load(worker, refs, COMPUTE_S) == set(INTO[3])
    assert slow.reads == [1, 2]
    slow.reads.clear()
    monkeypatch.setattr(load_work, "have_windows", lambda groups: groups == worker.rank.kv_groups)
    assert load(worker, refs, COMPUTE_S) == set()
    assert slow.reads == [1, 2, 1]


def test_what_the_scheduler_makes_of_it(played: Played, options: EngineOptions) -> None:
    """Neither promised nor saved again, its lease ends, and the tier is left alone."""
    played.side.close()
    auto = replace(options, load="auto")
    played.side = SchedulerSide(
        auto, played.handle, lambda _: OF_SCHEDULER, LAYOUT_OF_SCHEDULER, BLOCK
    )
    tokens = prompt(31, 3 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    name, blocks = request.request_id, [1, 2, 3, 4, 5, 6, 7]
    assert played.ask(request) == 3 * CHUNK
    played.side.allocated(request, [blocks], 3 * CHUNK)
    assert [job.compute_s for job in played.step({}).loads] == [0.0]  # not measured yet
    played.side.worker_news(None, [], set())
    played.step({"x": 1000})
    played.side.worker_news(None, [], set())
    prefill = played.side._planner.speeds.prefill_tokens_per_s
    assert prefill is not None
    slow = LAYOUT_OF_SCHEDULER.payload_bytes * prefill / CHUNK / 4
    report = WorkerReport(bandwidth={MEMORY: slow}, cut=frozenset({name}))
    played.side.worker_news(report, [name], {3, 4, 5, 6})
    played.wait_for_leases(0)
    assert played.ask(request, CHUNK) == 0
    meta = played.step({name: 2 * CHUNK + 1}, new=[(name, blocks, CHUNK)])
    assert saved(meta) == []
    assert played.ask(played.new(tokens)) == 0
    other = played.new(prompt(32, CHUNK + 1))
    assert played.ask(other) == 0
    meta = played.step({other.request_id: CHUNK + 1}, new=[(other.request_id, [8, 9, 10], 0)])
    assert len(saved(meta)) == 1  # what is not stored is saved as ever


def test_a_job_says_what_computing_takes(played: Played, options: EngineOptions) -> None:
    tokens = prompt(33, 2 * CHUNK + 1)
    played.put(tokens)
    for load_option, expected in (("auto", CHUNK / 1000), ("always", 0.0)):
        played.side.close()
        changed = replace(options, load=load_option)
        played.side = SchedulerSide(
            changed, played.handle, lambda _: OF_SCHEDULER, LAYOUT_OF_SCHEDULER, BLOCK
        )
        played.side._planner.speeds.saw_prefill(1000, 1.0)
        request = played.new(tokens)
        assert played.ask(request) == 2 * CHUNK
        played.side.allocated(request, [[1, 2, 3, 4, 5]], 2 * CHUNK)
        assert [job.compute_s for job in played.step({}).loads] == [expected]


def test_a_new_engine_knows_a_slow_tier_by_what_the_one_before_computed(
    options: EngineOptions,
) -> None:
    """Its first request is for what is stored: the load is told what computing takes, and a tier
    that is found slow by it is left alone, though this engine has computed nothing."""
    auto, engines = replace(options, load="auto"), []
    for _ in range(2):
        kept = KeptSpeed(auto.dir, "model on device")
        engines.append(Played(auto, kept))
        if len(engines) == 1:
            tokens = prompt(34, 3 * CHUNK + 1)
            engines[0].put(tokens)
            engines[0].side._planner.speeds.saw_prefill(1000, 1.0)
            kept.close()
            engines[0].side.close()
    played, name = engines[1], "r0"
    request, blocks = played.new(tokens), [1, 2, 3, 4, 5, 6, 7]
    assert request.request_id == name
    assert played.ask(request) == 3 * CHUNK
    played.side.allocated(request, [blocks], 3 * CHUNK)
    assert [job.compute_s for job in played.step({}).loads] == [CHUNK / 1000]
    slow = LAYOUT_OF_SCHEDULER.payload_bytes * 1000 / CHUNK / 4
    report = WorkerReport(bandwidth={MEMORY: slow}, cut=frozenset({name}))
    played.side.worker_news(report, [name], {3, 4, 5, 6})
    assert played.ask(request, CHUNK) == 0
    assert played.ask(played.new(tokens)) == 0
    for engine in engines:
        engine.side.close()
        engine.handle.close()


def test_ranks_tell_together_whose_loads_were_cut() -> None:
    one, two = WorkerReport(cut=frozenset({"a", "b"})), WorkerReport(cut=frozenset({"b", "c"}))
    assert one.aggregate(two).cut == two.aggregate(one).cut == {"a", "b", "c"}
