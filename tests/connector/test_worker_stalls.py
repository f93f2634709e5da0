"""A store that does not answer: what is given up, when, and what is left in peace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("vllm")

from connector import loading
from connector.destination import Destination
from connector.known import KnownNamespaces
from connector.load import Load
from connector.messages import BlendJob, LoadJob, RowsJob, StepMetadata
from tests.connector.played_worker import (
    DEADLINE_S,
    IDENTITY,
    STAGED_CHUNKS,
    STALL_S,
    Stuck,
    Worker,
    refs_of,
    snapshot,
    stored,
    untouched,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def stuck_namespace(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> Stuck:
    """Every look at the store of every rank."""
    monkeypatch.setattr(KnownNamespaces, "get", lambda self, store, name: stuck)
    return stuck


def test_a_late_answer_does_not_touch_the_pages(
    start: Callable[..., Worker], stuck_namespace: Stuck
) -> None:
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
    stuck_namespace.release.set()
    worker.side.close()  # waits for the thread that was late
    assert untouched(worker, before)
    assert worker.side.loader.finished(idle=True) == set()
    counts = worker.counted()
    assert counts["loads_stalled"] == 1


def test_a_store_that_does_not_say_what_a_namespace_is(
    start: Callable[..., Worker], stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its index may be on the disk that has died."""

    def namespace(self: KnownNamespaces, store: Any, name: bytes) -> Any:
        assert stuck.release.wait(2 * DEADLINE_S)
        return stuck

    monkeypatch.setattr(KnownNamespaces, "get", namespace)
    worker = start()
    assert worker.load(refs_of(worker, 1), [[1, 2]]) == {1, 2}


def test_a_thread_that_stays_stuck_does_not_hold_up_later_loads(
    start: Callable[..., Worker], stuck_namespace: Stuck
) -> None:
    """The bypass ends, the thread still waits: a load that is queued behind it must fail too."""
    worker = start()
    refs = refs_of(worker, 1)
    assert worker.load(refs, [[1, 2]]) == {1, 2}
    worker.handle._bypass_until = 0.0
    assert worker.load(refs, [[3, 4]]) == {3, 4}


class Steps:
    """A namespace that gives its chunks one by one, when told to."""

    def __init__(self) -> None:
        self.allowed, self.given = threading.Semaphore(0), threading.Semaphore(0)

    def get(
        self, refs: Sequence[Any], outs: Any, roi: Any, progress: Callable[[], None]
    ) -> list[int]:
        self.given.release()
        for _ in refs:
            assert self.allowed.acquire(timeout=DEADLINE_S)
            progress()
            self.given.release()
        return [1] * len(refs)


def test_a_store_that_is_slow_but_alive_is_not_given_up(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the time without a chunk, not that of the load."""
    steps, clock = Steps(), SimpleNamespace(now=1000.0)
    monkeypatch.setattr(KnownNamespaces, "get", lambda self, store, name: steps)
    monkeypatch.setattr(loading, "time", SimpleNamespace(monotonic=lambda: clock.now))
    worker = start()
    worker.start_load(refs_of(worker, 4), [[2 * i, 2 * i + 1] for i in range(4)])
    assert steps.given.acquire(timeout=DEADLINE_S)
    for _ in range(4):
        clock.now += 0.9 * STALL_S
        assert worker.side.loader.finished(idle=False) == set()
        assert worker.handle.get() is not None
        steps.allowed.release()
        assert steps.given.acquire(timeout=DEADLINE_S)
    worker.finish()
    assert worker.side.loader.failed_blocks() == set()
    assert "loads_stalled" not in worker.counted()


class SlowPages:
    """Writing pages takes until ``release`` is set."""

    def __init__(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.release = threading.Event(), threading.Event()
        write = Destination.write

        def slowly(*args: Any) -> None:
            self.entered.set()
            assert self.release.wait(DEADLINE_S)
            write(*args)

        monkeypatch.setattr(Destination, "write", slowly)


def test_pages_that_take_long_are_no_stall_of_the_store(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start()
    refs, blocks = refs_of(worker, 1), [[1, 2]]
    expected = worker.canonical(blocks[0])
    worker.save(refs, blocks)
    stored(worker, refs)
    pages = SlowPages(worker, monkeypatch)
    worker.start_load(refs, [[5, 6]])
    assert pages.entered.wait(DEADLINE_S)
    end = time.monotonic() + 2 * STALL_S
    while time.monotonic() < end:
        assert worker.side.loader.finished(idle=True) == set()
    assert worker.handle.get() is not None
    pages.release.set()
    worker.finish()
    assert worker.side.loader.failed_blocks() == set()
    assert worker.canonical([5, 6]) == expected


def test_giving_up_does_not_wait_for_pages_being_written(
    start: Callable[..., Worker], stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One load has its chunks and writes them; another's store is silent: only that one fails."""
    worker = start(load_threads=2)
    refs, blocks = refs_of(worker, 1), [[1, 2]]
    expected = worker.canonical(blocks[0])
    worker.save(refs, blocks)
    stored(worker, refs)
    real = KnownNamespaces.get
    monkeypatch.setattr(
        KnownNamespaces,
        "get",
        lambda self, store, name: stuck if name == b"stuck" else real(self, store, name),
    )
    pages = SlowPages(worker, monkeypatch)
    worker.start_load(refs, [[5, 6]], name="writing", namespace=IDENTITY.namespace)
    assert pages.entered.wait(DEADLINE_S)
    worker.start_load(refs, [[7, 8]], name="silent", namespace=b"stuck")
    worker.finish("silent")
    assert worker.side.loader.failed_blocks() == {7, 8}
    assert not pages.release.is_set()
    pages.release.set()
    worker.finish("writing")
    assert worker.side.loader.failed_blocks() == set()
    assert worker.canonical([5, 6]) == expected
    assert worker.counted()["loads_stalled"] == 1


def test_a_full_ring_drops_chunks_and_does_not_wait(
    start: Callable[..., Worker], stuck_namespace: Stuck
) -> None:
    worker = start()
    refs = refs_of(worker, 2 * STAGED_CHUNKS)
    for ref in refs:
        worker.save([ref], [[1, 2]])  # half of them find room
    assert worker.counted()["save_dropped_chunks"] == STAGED_CHUNKS
    assert stuck_namespace.entered.wait(DEADLINE_S)
    stuck_namespace.release.set()
    end = time.monotonic() + DEADLINE_S
    while True:  # room again, once what is staged is stored
        worker.save([refs[0]], [[1, 2]])
        if "save_dropped_chunks" not in worker.counted():
            break
        assert time.monotonic() < end


class Enqueued:
    """Stands for the event of what a load has sent to its pages."""

    def __init__(self) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        raise AssertionError("the engine's thread waits for it")


def loading_job(worker: Worker, stuck: Stuck, blend: RowsJob | None = None) -> Load:
    """A load whose thread waits for the store, with something on its way to the pages."""
    job = LoadJob("r", IDENTITY.namespace, refs_of(worker, 1), [[1, 2]], 0, STALL_S, blend)
    worker.side.start_loads(StepMetadata(loads=[job]))
    assert stuck.entered.wait(DEADLINE_S)
    [load] = worker.side.loader._loads.values()
    load.enqueued = cast(Any, Enqueued())
    return load


def test_a_load_is_stopped_when_its_pages_have_what_they_were_sent(
    start: Callable[..., Worker], stuck_namespace: Stuck
) -> None:
    """The engine's thread asks again rather than wait for as much as a load has under way; what
    becomes of the load meanwhile is told to nobody."""
    worker = start()
    load = loading_job(worker, stuck_namespace)
    loader = worker.side.loader
    load.placed = 8
    assert not loader.stop("r")
    assert load.barred, "nothing more is sent to them"
    assert loader.take_placed() == {}
    cast(Any, load.enqueued).over = True
    stuck_namespace.release.set()
    end = time.monotonic() + DEADLINE_S
    while loader._loads:
        assert time.monotonic() < end
        assert loader.finished(idle=True) == set()
    assert loader.stop("r")
    assert loader.finished(idle=False) == set()
    assert (loader.failed_requests(), loader.failed_blocks()) == (set(), set())
    assert "loads_failed" not in worker.counted()


def test_one_that_is_given_up_ends_when_its_pages_have_what_they_were_sent(
    start: Callable[..., Worker], stuck_namespace: Stuck
) -> None:
    worker = start()
    load = loading_job(worker, stuck_namespace)
    loader, end = worker.side.loader, time.monotonic() + DEADLINE_S
    while not loader.stalled:
        assert time.monotonic() < end
        assert loader.finished(idle=True) == set()
    assert load.barred
    assert loader.finished(idle=True) == set(), "it may be written to"
    cast(Any, load.enqueued).over = True
    assert loader.finished(idle=True) == {"r"}
    assert loader.failed_blocks() == {1, 2}
    stuck_namespace.release.set()


def test_what_a_blend_awaits_is_told_at_once_and_nothing_else(
    start: Callable[..., Worker], stuck_namespace: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "FURTHER_S", 1000.0)
    worker = start()
    job = BlendJob(list(range(8)), 8, [1, 2], [], "none", 0.0, 1, 16)
    load = loading_job(worker, stuck_namespace, job)
    loader, told = worker.side.loader, list[int]()
    for awaited, placed in ((0, 8), (16, 8), (16, 12), (16, 20), (16, 24), (0, 32)):
        loader.awaits("r", awaited)
        load.placed = placed
        told += [position for _, position in loader.take_placed().values()]
    assert told == [8, 20]
    stuck_namespace.release.set()
    assert loader.stop("r") or not load.is_written()


@pytest.mark.parametrize(
    ("awaited", "placed", "told", "told_at", "news"),
    [
        (0, 8, 0, -1.0, True),
        (0, 8, 0, 1.0, False),  # a while has not passed
        (0, 8, 8, -1.0, False),
        (16, 8, 0, -1.0, False),  # the next slice needs more
        (16, 16, 8, 1.0, True),
        (16, 24, 16, -1.0, False),  # it knows enough for that
    ],
)
def test_what_is_worth_telling_of_a_load(
    awaited: int, placed: int, told: int, told_at: float, news: bool
) -> None:
    job = LoadJob("r", b"", [], [], 0, 1.0)
    load = Load(job, placed=placed, told=told, told_at=told_at, awaited=awaited)
    assert load.is_news(told_before=0.0) == news
