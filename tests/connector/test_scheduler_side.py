"""The scheduler's half against a real store and a scheduler played by the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from connector.handle import StoreHandle
from connector.messages import SaveJob, StepMetadata, WorkerReport
from connector.options import EngineOptions
from connector.scheduler_side import SchedulerSide
from prefixstore import Layout, Namespace, Store, admin
from prefixstore.testing import content_of, identity_for

pytestmark = pytest.mark.timeout(60)

CHUNK, BLOCK = 8, 4
LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=CHUNK, head_bytes=16)
IDENTITY = identity_for("model", LAYOUT)
DEADLINE_S = 10.0
STALL_MS = 200


class Played:
    """A scheduler and its connector. ``ask`` asks until there is an answer, as vLLM does."""

    def __init__(self, options: EngineOptions) -> None:
        self.handle = StoreHandle(options)
        self.side = SchedulerSide(options, self.handle, lambda _: IDENTITY, LAYOUT, BLOCK)
        self.asked = 0

    @property
    def store(self) -> Store:
        store = self.handle.get()
        assert store is not None
        return store

    @property
    def namespace(self) -> Namespace:
        return self.store.namespace(IDENTITY, LAYOUT)

    def new(self, tokens: Sequence[int], **fields: Any) -> Any:
        request = SimpleNamespace(
            request_id=f"r{self.asked}", prompt_token_ids=list(tokens), prompt_embeds=None,
            all_token_ids=list(tokens), num_tokens=len(tokens), lora_request=None,
            cache_salt=None, kv_transfer_params=None, mm_features=None,
        )  # fmt: skip
        vars(request).update(fields)
        self.asked += 1
        self.side.on_new_request(request)
        return request

    def ask(self, request: Any, local: int = 0) -> int:
        end = time.monotonic() + DEADLINE_S
        while True:
            tokens, is_async = self.side.matched(request, local)
            if tokens is not None:
                assert is_async == (tokens > 0)
                return tokens
            assert time.monotonic() < end, "asked in vain"

    def step(
        self,
        scheduled: dict[str, int],
        new: Sequence[tuple[str, list[int], int]] = (),
        cached: Sequence[tuple[str, list[int] | None, int]] = (),
        resumed: Sequence[str] = (),
    ) -> StepMetadata:
        """One step: entries are (request, block ids, computed tokens)."""
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r, block_ids=[b], num_computed_tokens=n) for r, b, n in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r for r, _, _ in cached],
                new_block_ids=[None if b is None else [b] for _, b, _ in cached],
                num_computed_tokens=[n for _, _, n in cached],
                resumed_req_ids=set(resumed),
            ),
        )
        return self.side.step(output)

    def put(self, tokens: Sequence[int], salt: bytes = b"") -> None:
        refs = self.namespace.chain(tokens, salt=salt).refs()
        data = [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs]
        self.namespace.put(refs, data)


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    memory = tmp_path / "memory"
    memory.mkdir()
    return EngineOptions(
        dir=str(tmp_path / "store"), memory="4MiB", disk="4MiB", memory_dir=str(memory),
        load="always", stall_ms=STALL_MS,
    )  # fmt: skip


@pytest.fixture
def played(options: EngineOptions) -> Iterator[Played]:
    played = Played(options)
    yield played
    played.side.close()
    played.handle.close()


def prompt(seed: int, count: int) -> list[int]:
    return [seed * 1000 + i for i in range(count)]


def saved(meta: StepMetadata) -> list[tuple[str, list[int], list[list[int]]]]:
    def one(job: SaveJob) -> tuple[str, list[int], list[list[int]]]:
        return job.req_id, [ref.depth for ref in job.refs], job.blocks

    return [one(job) for job in meta.saves]


def test_a_hit_is_loaded_into_the_blocks_of_its_chunks(played: Played) -> None:
    tokens = prompt(1, 3 * CHUNK + 5)
    played.put(tokens)
    request = played.new(tokens)
    assert played.ask(request) == 3 * CHUNK
    blocks = list(range(100, 108))
    played.side.allocated(request, blocks, 3 * CHUNK)
    [job] = played.step({}).loads
    assert job.blocks == [[100, 101], [102, 103], [104, 105]]
    assert job.skip_blocks == 0
    assert [ref.key for ref in job.refs] == played.namespace.chain(tokens).keys
    assert played.step({}).loads == []
    assert played.side.take_counts() == {"tokens_hit_1": 3 * CHUNK}


@pytest.mark.parametrize(
    ("local", "loaded", "first", "skip"),
    [(0, 24, 0, 0), (4, 20, 0, 1), (8, 16, 1, 0), (12, 12, 1, 1), (20, 4, 2, 1), (24, 0, 3, 0)],
)
def test_only_what_vllm_does_not_have(
    played: Played, local: int, loaded: int, first: int, skip: int
) -> None:
    tokens = prompt(2, 3 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    assert played.ask(request, local) == loaded
    played.side.allocated(request, list(range(7)), loaded)
    jobs = played.step({}).loads
    if not loaded:
        assert jobs == []
        assert played.side.take_counts() == {"miss_not_needed": 1}
        return
    [job] = jobs
    assert job.blocks == [[2 * i, 2 * i + 1] for i in range(first, 3)]
    assert job.skip_blocks == skip


def test_what_is_asked_again_and_again_is_counted_once(played: Played) -> None:
    """vLLM asks in each step while it has no blocks for a request."""
    absent = played.new(prompt(3, 2 * CHUNK))
    assert [played.ask(absent) for _ in range(10)] == [0] * 10
    assert played.side.take_counts() == {"miss_absent": 1}


def test_a_hit_that_waits_for_blocks_stays_promised(played: Played) -> None:
    tokens = prompt(4, 2 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    assert [played.ask(request) for _ in range(10)] == [2 * CHUNK] * 10
    assert admin.stats(played.store)["leases"] == 2


@pytest.mark.parametrize("end", ["loaded", "finished", "not_needed"])
def test_leases_end(played: Played, end: str) -> None:
    tokens = prompt(5, 2 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens)
    assert played.ask(request) == 2 * CHUNK
    if end == "loaded":
        played.side.allocated(request, list(range(5)), 2 * CHUNK)
        played.step({})
        assert admin.stats(played.store)["leases"] == 2
        played.side.worker_news(None, [request.request_id], set())
    elif end == "finished":
        played.side.finished(request)
    else:
        assert played.ask(request, 2 * CHUNK) == 0
    deadline = time.monotonic() + DEADLINE_S
    while admin.stats(played.store)["leases"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_chunk_is_saved_once_when_it_is_complete(played: Played) -> None:
    request = played.new(prompt(6, 3 * CHUNK + 2))
    name = request.request_id
    played.ask(request)
    played.side.allocated(request, [10, 11, 12], 0)
    meta = played.step({name: 12}, new=[(name, [10, 11, 12], 0)])
    assert saved(meta) == [(name, [0], [[10, 11]])]
    assert not meta.idle
    meta = played.step({name: 4}, cached=[(name, [20], 12)])
    assert saved(meta) == [(name, [1], [[12, 20]])]
    meta = played.step({name: 10}, cached=[(name, [21, 22, 23], 16)])
    assert saved(meta) == [(name, [2], [[21, 22]])]
    for computed in range(26, 32):  # generated tokens fill the next chunk
        assert all(indices != [3] for _, indices, _ in saved(meta))
        request.all_token_ids.append(7)
        request.num_tokens += 1
        block = [24] if computed == 28 else None
        meta = played.step({name: 1}, cached=[(name, block, computed)])
    assert saved(meta) == [(name, [3], [[23, 24]])]
    chain = played.namespace.chain(request.all_token_ids)
    assert meta.saves[0].refs[0].key == chain.keys[3]


def test_a_resumed_request_has_new_blocks(played: Played) -> None:
    request = played.new(prompt(7, 2 * CHUNK))
    name = request.request_id
    played.ask(request)
    played.step({name: 8}, new=[(name, [1, 2], 0)])
    meta = played.step({name: 16}, cached=[(name, [5, 6, 7, 8], 0)], resumed=[name])
    assert saved(meta) == [(name, [1], [[7, 8]])]


def test_a_hit_is_not_saved_again_but_what_failed_to_load_is(played: Played) -> None:
    tokens = prompt(8, 4 * CHUNK + 1)
    played.put(tokens)
    for invalid, expected in ((set[int](), []), ({4, 5, 6, 7}, [2, 3])):
        request = played.new(tokens)
        name = request.request_id
        played.ask(request)
        blocks = list(range(9))
        played.side.allocated(request, blocks, 4 * CHUNK)
        played.step({})
        played.side.worker_news(None, [name], invalid)
        played.side.take_counts()
        count = CHUNK * len(expected) + 1
        meta = played.step({name: count}, new=[(name, blocks, 33 - count)])
        assert [index for _, indices, _ in saved(meta) for index in indices] == expected


@pytest.mark.parametrize("limit", [0, 7, 8, 15, 16, 100])
def test_max_load_tokens(played: Played, limit: int) -> None:
    tokens = prompt(9, 3 * CHUNK + 1)
    played.put(tokens)
    request = played.new(tokens, kv_transfer_params={"prefixstore": {"max_load_tokens": limit}})
    assert played.ask(request) == min(limit // CHUNK, 3) * CHUNK


def test_nothing_is_saved_of_a_request_that_says_so(played: Played) -> None:
    request = played.new(prompt(10, CHUNK), kv_transfer_params={"prefixstore": {"write": False}})
    assert played.step({request.request_id: 8}, new=[(request.request_id, [1, 2], 0)]).saves == []


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
    played.side.allocated(request, [1, 2, 3, 4], 0)
    played.step({request.request_id: 16}, new=[(request.request_id, [1, 2, 3, 4], 0)])
    played.side.finished(request)


def test_an_adapter_that_cannot_be_read(played: Played, options: EngineOptions) -> None:
    def broken(lora: Any) -> Any:
        raise OSError("no such adapter")

    side = SchedulerSide(options, played.handle, broken, LAYOUT, BLOCK)
    played.side, first = side, played.side
    first.close()
    assert played.ask(played.new(prompt(12, CHUNK))) == 0


def test_a_stalled_store_is_given_up_in_time(played: Played) -> None:
    tokens = prompt(13, 2 * CHUNK + 1)
    played.put(tokens)
    release, holding = threading.Event(), threading.Event()

    def hold(txn: Any) -> None:
        holding.set()
        release.wait(DEADLINE_S)

    played.store.live.submit(hold)
    assert holding.wait(DEADLINE_S)
    try:
        began = time.monotonic()
        assert played.ask(played.new(tokens)) == 0
        first_s = time.monotonic() - began
        counts = played.side.take_counts()
        assert counts == {"miss_stalled": 1}
        assert played.handle.get() is None
        began = time.monotonic()
        assert played.ask(played.new(tokens)) == 0
        second_s = time.monotonic() - began
        assert played.side.take_counts() == {"miss_bypassed": 1}
    finally:
        release.set()
    assert STALL_MS / 1000 <= first_s < DEADLINE_S / 4
    assert second_s < first_s  # bypassed: not even asked


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
    auto = EngineOptions(**{**_fields(options), "load": "auto"})
    played.side = SchedulerSide(auto, played.handle, lambda _: IDENTITY, LAYOUT, BLOCK)
    assert played.ask(played.new(tokens)) == 3 * CHUNK  # nothing measured: try
    played.side.worker_news(WorkerReport(bandwidth={1: 10.0}), [], set())
    assert played.ask(played.new(tokens)) == 3 * CHUNK  # prefill not measured yet
    played.step({"x": 4096})
    played.side.worker_news(None, [], set())  # 4096 tokens in no time
    assert played.ask(played.new(tokens)) == 0
    assert played.side.take_counts() == {"miss_slower_to_load": 1}


def _fields(options: EngineOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in EngineOptions.__dataclass_fields__}
