"""The scheduler's half in trouble: bad requests, slow or silent stores; and what is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from connector.messages import WorkerReport
from connector.options import EngineOptions
from connector.scheduler_side import SchedulerSide
from prefixstore import Namespace
from prefixstore.config import LANE_QUEUE_MAX
from prefixstore.errors import StoreError, StoreTimeoutError
from prefixstore.ledger import MEMORY
from prefixstore.namespace import MISS
from tests.connector.played_scheduler import (
    BLOCK,
    CHUNK,
    DEADLINE_S,
    IDENTITY,
    LAYOUT,
    STALL_MS,
    Played,
    prompt,
)

pytestmark = pytest.mark.timeout(60)


BAD = [
    {"kv_transfer_params": {"prefixstore": {"reed": 1}}},
    {"kv_transfer_params": {"prefixstore": 1}},
    {"kv_transfer_params": [1]},
    {"kv_transfer_params": {"prefixstore": {"salt": "\ud800"}}},
    {"kv_transfer_params": {"prefixstore": {"tag": "\ud800"}}},
    {"cache_salt": "\ud800"},
    {"cache_salt": "x" * 100_000},
]


@pytest.mark.parametrize("fields", BAD, ids=[str(i) for i in range(len(BAD))])
def test_no_request_can_stop_the_engine(played: Played, fields: dict[str, Any]) -> None:
    """Whatever a client sends: an exception here would end the engine for all."""
    request = played.new(prompt(11, 2 * CHUNK), **fields)
    assert played.ask(request) == 0
    played.side.allocated(request, [[1, 2, 3, 4]], 0)
    meta = played.step({request.request_id: 16}, new=[(request.request_id, [1, 2, 3, 4], 0)])
    told = played.side.finished(request)
    if "cache_salt" in fields:  # vLLM's own, whatever it is
        assert told is None
        assert len(meta.saves) == 1
    else:
        assert told is not None
        assert told["prefixstore"]["error"]
        assert meta.saves == []
        assert played.side.take_counts()["bad_params"] == 1


def test_an_adapter_that_cannot_be_read(played: Played, options: EngineOptions) -> None:
    def broken(lora: Any) -> Any:
        raise OSError("no such adapter")

    side = SchedulerSide(options, played.handle, broken, LAYOUT, BLOCK)
    played.side, first = side, played.side
    first.close()
    assert played.ask(played.new(prompt(12, CHUNK))) == 0


@contextmanager
def silent() -> Iterator[None]:
    """Look-ups do not come to an end."""
    release, match = threading.Event(), Namespace.match

    def held_up(*given: Any) -> Any:
        release.wait(DEADLINE_S)
        return match(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Namespace, "match", held_up)
        try:
            yield
        finally:
            release.set()


@contextmanager
def held_lock(played: Played) -> Iterator[None]:
    """Nobody comes to write the index of the memory tier."""
    release, holding = threading.Event(), threading.Event()

    def hold(txn: Any) -> None:
        holding.set()
        release.wait(DEADLINE_S)

    played.store.live.submit(hold)
    assert holding.wait(DEADLINE_S)
    try:
        yield
    finally:
        release.set()


def admit(played: Played, request: Any) -> dict[str, int]:
    """vLLM has blocks for a request that loads nothing; returns what has been counted."""
    played.side.allocated(request, [[1, 2, 3, 4, 5]], 0)
    return played.side.take_counts()


def test_a_stalled_store_is_given_up_in_time(played: Played) -> None:
    tokens = prompt(13, 2 * CHUNK + 1)
    played.put(tokens)
    with silent():
        first, second = played.new(tokens), played.new(tokens)
        began = time.monotonic()
        assert played.ask(first) == 0
        first_s = time.monotonic() - began
        assert admit(played, first) == {"miss_stalled": 1}
        assert played.handle.get() is None
        began = time.monotonic()
        assert played.ask(second) == 0
        second_s = time.monotonic() - began
        assert admit(played, second) == {"miss_bypassed": 1}
    assert STALL_MS / 1000 <= first_s < DEADLINE_S / 4
    assert second_s < first_s  # bypassed: not even asked


def test_what_is_asked_again_and_again_is_counted_once(played: Played) -> None:
    """vLLM asks in each step while it has no blocks for a request."""
    absent = played.new(prompt(3, 2 * CHUNK))
    assert [played.ask(absent) for _ in range(10)] == [0] * 10
    assert played.side.take_counts() == {}
    assert admit(played, absent) == {"miss_absent": 1}
    assert admit(played, absent) == {}


def test_a_stall_asked_again_is_one_miss(played: Played) -> None:
    tokens = prompt(21, 2 * CHUNK + 1)
    played.put(tokens)
    with silent():
        request = played.new(tokens)
        assert [played.ask(request) for _ in range(3)] == [0] * 3
        assert admit(played, request) == {"miss_stalled": 1}


def test_a_held_writer_lock_holds_up_no_look_up(played: Played) -> None:
    """A lease is asked for and not waited for; it is taken, and ends, when the lock is free."""
    tokens = prompt(25, 2 * CHUNK + 1)
    played.put(tokens)
    with held_lock(played):
        request, gone = played.new(tokens), played.new(tokens)
        assert played.ask(request) == played.ask(gone) == 2 * CHUNK
        played.side.finished(gone)
    played.wait_for_leases(1)
    played.side.finished(request)
    played.wait_for_leases(0)


def test_more_look_ups_than_may_wait_for_the_lock(played: Played) -> None:
    """Those that come to no lease are hits like others; nothing stays that nobody ends."""
    tokens = prompt(27, 2 * CHUNK + 1)
    played.put(tokens)
    with held_lock(played):
        requests = [played.new(tokens) for _ in range(50)]
        assert [played.ask(request) for request in requests] == [2 * CHUNK] * 50
        with suppress(StoreTimeoutError):
            for _ in range(LANE_QUEUE_MAX + 1):
                played.store.live.submit(lambda txn: None)
        with pytest.raises(StoreTimeoutError, match="already wait"):
            played.store.live.submit(lambda txn: None)
        late = played.new(tokens)
        assert played.ask(late) == 2 * CHUNK
        for request in (*requests, late):
            played.side.finished(request)
    played.wait_for_leases(0)
    assert played.side.take_counts() == {}


def test_a_chunk_that_goes_before_it_is_leased_is_found_missing(played: Played) -> None:
    """By the load, which says so, and not by its lease: the next chunks' is as it would be."""
    tokens = prompt(26, 2 * CHUNK + 1)
    played.put(tokens)
    refs = played.namespace.chain(tokens).refs()
    with held_lock(played):
        waiting = played.store.live._queue.qsize()
        gone = threading.Thread(target=played.namespace.delete, args=(refs[:1],))
        gone.start()
        end = time.monotonic() + DEADLINE_S
        while played.store.live._queue.qsize() < waiting + 1:  # asked for before the lease
            assert time.monotonic() < end
            time.sleep(0.001)
        request = played.new(tokens)
        assert played.ask(request) == 2 * CHUNK
    gone.join(DEADLINE_S)
    outs = [memoryview(bytearray(LAYOUT.payload_bytes)) for _ in refs]
    assert played.namespace.get(refs, outs) == [MISS, MEMORY]
    played.wait_for_leases(1)
    played.side.finished(request)
    played.wait_for_leases(0)


def test_a_failing_look_up_asked_again_is_one_miss(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise StoreError("broken")

    monkeypatch.setattr(Namespace, "match", broken)
    request = played.new(prompt(22, 2 * CHUNK))
    assert [played.ask(request) for _ in range(5)] == [0] * 5
    assert admit(played, request) == {"miss_error": 1}


def test_a_request_that_loads_in_the_end_is_no_miss(played: Played) -> None:
    """It had to wait for blocks, and the bypass ended meanwhile."""
    tokens = prompt(23, 2 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    played.handle.stalled("a test")
    assert played.ask(request) == 0
    played.handle._bypass_until = 0.0
    assert played.ask(request) == 2 * CHUNK
    played.side.allocated(request, [[1, 2, 3, 4, 5]], 2 * CHUNK)
    played.step({})
    played.side.worker_news(None, [request.request_id], set())
    assert admit(played, request) == {"tokens_hit_1": 2 * CHUNK}


def test_a_load_that_failed_is_no_miss_besides(played: Played) -> None:
    """The workers count it."""
    tokens = prompt(24, 2 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    assert played.ask(request) == 2 * CHUNK
    played.side.allocated(request, [[1, 2, 3, 4, 5]], 2 * CHUNK)
    played.step({})
    played.side.worker_news(None, [request.request_id], {1})
    assert played.ask(request) == 0
    assert admit(played, request) == {"tokens_hit_1": 2 * CHUNK}


UNSTABLE: list[dict[str, Any]] = [
    {"prompt_token_ids": None},
    {"prompt_embeds": object()},
    {"resumable": True},
    {
        "mm_features": [
            SimpleNamespace(
                modality="image", identifier="7", mm_position=SimpleNamespace(offset=1, length=4)
            )
        ]
    },
]


@pytest.mark.parametrize("fields", UNSTABLE, ids=[next(iter(fields)) for fields in UNSTABLE])
def test_requests_without_lasting_tokens_are_neither_loaded_nor_saved(
    played: Played, fields: dict[str, Any]
) -> None:
    tokens = prompt(25, 2 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens, **fields)
    assert played.ask(request) == 0
    assert admit(played, request) == {}
    name = request.request_id
    assert played.step({name: 17}, new=[(name, [1, 2, 3, 4, 5], 0)]).saves == []
    assert played.side.finished(request) is None


def test_workers_that_cannot_use_the_store_end_it(played: Played) -> None:
    tokens = prompt(14, 2 * CHUNK + 1)
    played.put(tokens)
    before = played.new(tokens)
    played.side.worker_news(WorkerReport(disabled="pages"), [], set())
    assert played.ask(before) == 0
    request = played.new(tokens)
    assert played.ask(request) == 0
    assert played.step({request.request_id: 17}, new=[(request.request_id, [0] * 5, 0)]).saves == []


def test_slow_tiers_are_not_loaded_from(played: Played, options: EngineOptions) -> None:
    tokens = prompt(15, 3 * CHUNK + 1)
    played.put(tokens)
    played.side.close()
    auto = replace(options, load="auto")
    played.side = SchedulerSide(auto, played.handle, lambda _: IDENTITY, LAYOUT, BLOCK)
    assert played.ask(played.new(tokens)) == 3 * CHUNK  # nothing measured: try
    played.side.worker_news(WorkerReport(bandwidth={1: 10.0}), [], set())
    assert played.ask(played.new(tokens)) == 3 * CHUNK  # prefill not measured yet
    played.step({"x": 4096})
    played.side.worker_news(None, [], set())  # 4096 tokens in no time
    slow = played.new(tokens)
    assert played.ask(slow) == 0
    assert admit(played, slow) == {"miss_slower_to_load": 1}


@pytest.mark.parametrize(("load", "save"), [("never", True), ("always", False), ("never", False)])
def test_an_engine_that_only_saves_or_only_loads(
    played: Played, options: EngineOptions, load: str, save: bool
) -> None:
    tokens = prompt(26, 2 * CHUNK + 1)
    played.put(tokens[:CHUNK])
    played.side.close()
    limited = replace(options, load=load, save=save)
    played.side = SchedulerSide(limited, played.handle, lambda _: IDENTITY, LAYOUT, BLOCK)
    request = played.new(tokens)
    assert played.ask(request) == (CHUNK if load == "always" else 0)
    name = request.request_id
    saves = played.step({name: 17}, new=[(name, [1, 2, 3, 4, 5], 0)]).saves
    assert [len(job.refs) for job in saves] == ([2] if save else [])
