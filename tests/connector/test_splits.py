"""Splits on a rank: what is loaded from the back, what is computed, and who is told; no engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from connector import blending, loading
from connector.known import KnownNamespaces
from connector.messages import WHOLE, BlendCommand, LoadJob, SplitJob, StepMetadata, WorkerReport
from prefixstore.namespace import MISS
from tests.connector.played_loads import BLOCKS_OF as SAVED
from tests.connector.played_loads import INTO
from tests.connector.played_worker import (
    BLOCK,
    CHUNK,
    DEADLINE_S,
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

BEFORE = [28, 29]  # blocks of a chunk that the engine has
BLOCKS = BEFORE + [block for blocks in INTO for block in blocks]
END = BLOCK * len(BLOCKS)


class Computing:
    """What stands for the engine, and notes the rows that were to be computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_ranks: int = 1) -> None:
        self.num_ranks, self.rows, self.device = num_ranks, list[int](), torch.device("cpu")
        self.fails_at = WHOLE
        monkeypatch.setattr(blending, "VllmHost", lambda engine, ids, blocks: (ids, blocks))
        monkeypatch.setattr(blending, "compute", self.compute)

    def compute(self, host: tuple[list[int], list[int]], start: int, stop: int) -> None:
        assert host == (list(range(END)), BLOCKS)
        if start <= self.fails_at < stop:
            raise RuntimeError("out of memory")
        self.rows += range(start, stop)


class Reads:
    """The store's namespace; it may lose chunks, and one may take until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.depths: list[int] = []
        self.lost: set[int] = set()
        self.holds, self.let_go = -1, threading.Event()
        real = KnownNamespaces.get

        def get(known: KnownNamespaces, store: Any, name: bytes) -> Any:
            self.namespace = real(known, store, name)
            return self

        monkeypatch.setattr(KnownNamespaces, "get", get)

    def get(self, refs: Sequence[Any], *arguments: Any) -> list[int]:
        self.depths += [ref.depth for ref in reversed(refs)]
        if self.holds in self.depths:
            assert self.let_go.wait(DEADLINE_S)
        tiers: list[int] = self.namespace.get(refs, *arguments)
        return [MISS if r.depth in self.lost else t for r, t in zip(refs, tiers, strict=True)]


class Split:
    """A request whose four chunks behind BEFORE are stored, on a worker that begins to load."""

    def __init__(self, start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch) -> None:
        self.worker = start()
        self.refs = refs_of(self.worker, len(SAVED))
        save_all(self.worker, self.refs, SAVED)
        self.expected = [self.worker.canonical(blocks) for blocks in SAVED]
        self.before = snapshot(self.worker)
        self.reads, self.computing = Reads(monkeypatch), Computing(monkeypatch)
        self.engine(self.computing)
        self.news: list[WorkerReport] = []

    def engine(self, engine: Any) -> None:
        self.worker.rank.engine = self.worker.side._blender._engine = engine

    def begin(self) -> None:
        split = SplitJob(list(range(END)), CHUNK, BLOCKS)
        job = LoadJob("r", IDENTITY.namespace, self.refs, INTO, 0, STALL_S, split)
        self.step(loads=[job])

    def step(self, *commands: BlendCommand, loads: Sequence[LoadJob] = ()) -> set[str]:
        """One step of the engine; what has finished in it."""
        self.worker.side.start_loads(StepMetadata(loads=list(loads), blends=list(commands)))
        finished = self.worker.side.finished(idle=True)
        report = self.worker.side.report()
        self.news += [] if report is None else [report]
        return finished

    def steps_until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < end, self.news
            assert self.step() == set()

    @property
    def placed(self) -> list[int]:
        return [report.placed["r"][0] for report in self.news if "r" in report.placed]

    @property
    def ended(self) -> bool:
        return any("r" in report.blends for report in self.news)

    def loaded(self, numbers: Sequence[int]) -> bool:
        """Whether these chunks, and no others, were written."""
        here = [self.worker.canonical(INTO[n]) == self.expected[n] for n in numbers]
        blocks = [block for n in numbers for block in INTO[n]]
        return all(here) and untouched(self.worker, self.before, blocks)


@pytest.fixture
def split(start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch) -> Split:
    return Split(start, monkeypatch)


def compute(until: int, *, ends: bool = False) -> BlendCommand:
    return BlendCommand("r", 1, frozenset(), False, until, ends=ends)


def position(number: int) -> int:
    """Of the first token of a chunk."""
    return CHUNK * (1 + number)


ABORT = BlendCommand("r", 0, frozenset(), True, CHUNK)


def test_the_last_chunk_comes_first(split: Split) -> None:
    split.begin()
    split.steps_until(lambda: split.ended)
    assert split.reads.depths == [3, 2, 1, 0]
    assert split.loaded(range(4))
    assert split.placed == sorted(set(split.placed), reverse=True)
    assert split.placed[-1] == position(0) == CHUNK
    assert split.step(compute(CHUNK, ends=True)) == {"r"}
    assert split.computing.rows == []
    assert split.worker.side.failed_blocks() == set()
    size = len(SAVED) * LAYOUT.payload_bytes
    assert split.worker.counted() == {"bytes_loaded_1": size}


def test_what_is_computed_is_not_loaded(split: Split) -> None:
    split.reads.holds = 1
    split.begin()
    split.steps_until(lambda: split.reads.depths == [3, 2, 1] and split.placed[-1] == position(2))
    assert split.step(compute(position(1))) == set()
    split.reads.let_go.set()
    split.steps_until(lambda: split.ended)
    assert split.reads.depths == [3, 2, 1]
    assert split.placed[-1] == position(1)
    assert split.step(compute(position(1), ends=True)) == {"r"}
    assert split.loaded([1, 2, 3])
    assert split.computing.rows == list(range(position(0), position(1)))
    counts = split.worker.counted()
    assert counts["split_computed_tokens"] == CHUNK
    assert counts["bytes_loaded_1"] == 3 * LAYOUT.payload_bytes


def test_what_is_being_read_when_all_is_there_is_written_nowhere(split: Split) -> None:
    split.reads.holds = 1
    split.begin()
    split.steps_until(lambda: split.reads.depths == [3, 2, 1] and split.placed[-1] == position(2))
    assert split.step(compute(position(1))) == set()
    assert split.step(compute(position(2), ends=True)) == {"r"}
    assert split.computing.rows == list(range(position(0), position(2)))
    told = len(split.news)
    split.reads.let_go.set()
    split.worker.side.loader.close(time.monotonic() + DEADLINE_S)
    assert split.loaded([2, 3])
    assert split.step() == set()
    assert all("r" not in {**news.placed, **news.blends} for news in split.news[told:])
    assert split.worker.side.failed_blocks() == set()


@pytest.mark.parametrize("lost", range(4))
def test_it_ends_at_what_is_lost(split: Split, lost: int) -> None:
    split.reads.lost = {lost}
    split.begin()
    split.steps_until(lambda: split.ended)
    assert split.loaded(range(lost + 1, 4))
    assert split.placed[-1] == position(lost + 1)
    assert not split.news[-1].blends["r"].aborted
    assert split.step(compute(position(lost + 1), ends=True)) == {"r"}
    assert split.computing.rows == list(range(position(0), position(lost + 1)))
    assert split.worker.side.failed_blocks() == set()


def test_a_store_that_stalls_is_left_for_computing(split: Split) -> None:
    """What had come by then counts."""
    split.reads.holds = 1
    split.begin()
    split.steps_until(lambda: split.ended)
    assert split.placed[-1] == position(2)
    assert split.worker.handle.get() is None
    assert split.step(compute(position(2), ends=True)) == {"r"}
    split.reads.let_go.set()
    split.worker.side.loader.close(time.monotonic() + DEADLINE_S)
    assert split.loaded([2, 3])
    assert split.worker.side.failed_blocks() == set()
    assert split.worker.side.loader.failed_requests() == set()
    assert split.worker.counted()["loads_stalled"] == 1


def test_a_request_that_is_gone_is_let_go_of(split: Split) -> None:
    """While its chunks are read, and with no word of it to the engine afterwards."""
    split.reads.holds = 2
    split.begin()
    split.steps_until(lambda: split.reads.depths == [3, 2] and split.placed[-1] == position(3))
    assert split.step(ABORT) == {"r"}
    split.reads.let_go.set()
    split.worker.side.loader.close(time.monotonic() + DEADLINE_S)
    assert split.loaded([3])
    assert split.step() == set()
    assert split.computing.rows == []


def test_what_cannot_be_computed_is_left_to_the_engine(split: Split) -> None:
    """From the first row that was not: what is loaded behind it is of no use then."""
    split.reads.holds = 3
    split.begin()
    assert split.step(compute(position(1))) == set()
    split.computing.fails_at = position(1) + 1
    assert split.step(compute(position(2))) == {"r"}
    assert split.worker.side.failed_blocks() == {b for blocks in INTO[1:] for b in blocks}
    split.reads.let_go.set()
    assert split.step(compute(position(3))) == set()  # told before the news of it
    assert split.worker.counted()["blends_failed"] == 1


def test_with_more_ranks_it_ends_the_engine(split: Split) -> None:
    """They wait for this one."""
    split.begin()
    split.steps_until(lambda: split.ended)
    split.computing.num_ranks, split.computing.fails_at = 2, position(0)
    with pytest.raises(RuntimeError, match="out of memory"):
        split.step(compute(position(1)))


def test_a_rank_that_cannot_compute_has_all_give_it_up(split: Split) -> None:
    """It says so at once, whatever loads are before it: else it would be told to compute."""
    split.engine(None)
    split.reads.holds = 0
    before = LoadJob("before", IDENTITY.namespace, split.refs, SAVED, 0, STALL_S)
    split.step(loads=[before])
    split.begin()
    assert split.placed == [END]
    assert split.news[-1].blends["r"].aborted
    assert split.step(ABORT) == {"r"}
    assert split.worker.side.failed_blocks() == {b for blocks in INTO for b in blocks}
    split.reads.let_go.set()
    end = time.monotonic() + DEADLINE_S
    while split.step() != {"before"}:
        assert time.monotonic() < end
    assert split.loaded([])


def test_what_a_split_reads_of_memory_says_nothing_of_its_speed(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other loads may have the GPU read it."""
    monkeypatch.setattr("connector.bandwidth.MEASURED_BYTES_MIN", 1)
    split.worker.side.loader.bandwidth._warm.add(1)
    split.begin()
    split.steps_until(lambda: split.ended)
    assert split.step(compute(CHUNK, ends=True)) == {"r"}
    assert all(report.bandwidth == {} for report in split.news)
    split.step(loads=[LoadJob("plain", IDENTITY.namespace, split.refs, INTO, 0, STALL_S)])
    end = time.monotonic() + DEADLINE_S
    while not split.news[-1].bandwidth:
        assert time.monotonic() < end
        split.step()
    assert split.news[-1].bandwidth.keys() == {1}


def test_pages_that_are_being_written_are_waited_for(split: Split) -> None:
    """The request has not ended before: its blocks may be another's next."""
    split.reads.holds = 2
    split.begin()
    split.steps_until(lambda: split.reads.depths == [3, 2] and split.placed[-1] == position(3))
    with split.worker.side.loader._loads["r"].pages_lock:
        assert split.step(ABORT) == set()
        assert split.step() == set()
    assert split.step() == {"r"}
    split.reads.let_go.set()


def test_how_far_a_load_has_come_is_told_once_in_a_while(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each word of it is a step of an engine that does nothing else."""
    monkeypatch.setattr(loading, "FURTHER_S", 60.0)
    split.reads.holds = 0
    split.begin()
    split.steps_until(lambda: split.reads.depths == [3, 2, 1, 0])
    for _ in range(3):
        split.step()
    load = split.worker.side.loader._loads["r"]
    assert load.placed == position(1)
    assert len(split.placed) == 1, "what came first was told at once, and what came since was not"
    monkeypatch.setattr(loading, "FURTHER_S", 0.0)
    split.steps_until(lambda: split.placed[-1] == position(1))
    monkeypatch.setattr(loading, "FURTHER_S", 60.0)
    split.reads.let_go.set()
    split.steps_until(lambda: split.ended)
    assert split.placed[-1] == CHUNK, "its end is told, however soon"
