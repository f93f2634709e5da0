"""What single requests may ask for, and many requests at once, without vLLM's own prefix cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Engine, Request
from prefixstore import Store, admin
from tests.engine.support import (
    ANSWER_TOKENS,
    DEADLINE_S,
    NEVER,
    ONLY_READ,
    ONLY_WRITE,
    PROMPTS,
    Truth,
    ask,
    counted,
    counting,
    distance,
    hit_tokens,
    misses,
    same,
    start,
    tokens,
    wait_for_chunks,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

ROUNDING = 1e-2
BATCH = [name for name in PROMPTS if name.startswith("batch")]


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path) -> Iterator[Engine]:
    with start(model, folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def stored(engine: Engine, folder: Path, truth: Truth) -> Engine:
    """The engine, its store holding "five" (and nothing else that these tests ask for)."""
    assert same(ask(engine, "five"), truth["five"])
    wait_for_chunks(folder, 5)
    return engine


def options(**given: Any) -> dict[str, Any]:
    return {"prefixstore": given}


def chunks(folder: Path) -> list[admin.Listed]:
    with Store.open(folder, create=False) as store:
        return list(admin.list_chunks(store))


# ---------------------------------------------------------------------- kv_transfer_params
def test_read_false_computes(stored: Engine, truth: Truth) -> None:
    with counting(stored) as found:
        answer = ask(stored, "five", params=NEVER)
    assert same(answer, truth["five"])
    assert answer.cached_tokens == 0
    assert hit_tokens(found) == 0


def test_write_false_stores_nothing(stored: Engine, folder: Path) -> None:
    prompt = tokens(20, 200)
    with counting(stored) as found:
        ask(stored, prompt, params=ONLY_READ)
        ask(stored, prompt, params=ONLY_READ)
    assert hit_tokens(found) == 0
    assert "chunks_saved" not in found
    assert misses(found) == {"absent": 2}


def test_max_load_tokens_bounds_the_load(stored: Engine, truth: Truth) -> None:
    for limit, expected in ((0, 0), (63, 0), (64, 64), (200, 192), (10_000, 320)):
        answer = ask(stored, "five", params=options(max_load_tokens=limit, write=False))
        assert answer.cached_tokens == expected
        assert same(answer, truth["five"])


def test_salts_keep_requests_apart(stored: Engine, truth: Truth) -> None:
    tenants: list[dict[str, Any]] = [
        {"params": options(salt="a")},
        {"params": options(salt="b")},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"cache_salt": "a", "params": options(salt="b")},
        {"cache_salt": "b", "params": options(salt="a")},
    ]
    for round_, expected in enumerate((0, 320)):
        for tenant in tenants:
            answer = ask(stored, "five", **tenant)
            assert answer.cached_tokens == expected, (round_, tenant)
            assert same(answer, truth["five"])
        counted(stored)  # all saves have ended


def test_pin_ttl_and_tag_reach_the_rows(stored: Engine, folder: Path) -> None:
    before = {chunk.key for chunk in chunks(folder)}
    ask(stored, tokens(21, 130), params=options(pin=True, ttl_s=3600, tag="docs"))
    wait_for_chunks(folder, len(before) + 2)
    new = [chunk.row for chunk in chunks(folder) if chunk.key not in before]
    assert [(row.pinned, row.tag) for row in new] == [(True, b"docs")] * 2
    assert all(abs(row.expires_s - row.created_s - 3600) <= 5 for row in new)


def test_an_expired_chunk_is_a_miss(stored: Engine) -> None:
    prompt = tokens(22, 100)
    ask(stored, prompt, params=options(ttl_s=1))
    counted(stored)
    assert ask(stored, prompt, params=ONLY_READ).cached_tokens == 64
    end = time.monotonic() + DEADLINE_S
    while ask(stored, prompt, params=ONLY_READ).cached_tokens:
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prefixstore": {"reed": False}}, "reed"),
        ({"prefixstore": {"ttl_s": -1}}, "ttl_s"),
        ({"prefixstore": {"pin": "yes"}}, "pin"),
        ({"prefixstore": {"salt": 7}}, "salt"),
        ({"prefixstore": {"max_load_tokens": 1.5}}, "max_load_tokens"),
        ({"prefixstore": [1]}, "prefixstore"),
    ],
)
def test_a_mistake_is_told_and_the_request_served(
    stored: Engine, truth: Truth, given: dict[str, Any], named: str
) -> None:
    with counting(stored) as found:
        answer = ask(stored, "five", params=given)
    assert answer.params is not None
    assert named in answer.params["prefixstore"]["error"]
    assert same(answer, truth["five"])
    assert answer.cached_tokens == 0
    assert found["bad_params"] == 1


def test_a_good_request_carries_no_error(stored: Engine) -> None:
    assert not ask(stored, "five", params=ONLY_READ).params


# ---------------------------------------------------------------------- lengths
@pytest.mark.parametrize("name", ["short", "whole", "fork"])
def test_edges_of_the_prompt(stored: Engine, truth: Truth, name: str) -> None:
    ask(stored, name, params=ONLY_WRITE)
    counted(stored)
    answer = ask(stored, name)
    full = len(PROMPTS[name]) // 64 * 64
    assert answer.cached_tokens == full
    if name == "whole":
        # vLLM computes the last token again, to sample from it: alone, so it is rounded
        # unlike in a step of 64.
        assert distance(answer, truth[name]) < ROUNDING
    else:
        assert same(answer, truth[name])


# ---------------------------------------------------------------------- many at once
def mixed_requests() -> list[Request]:
    """Twelve: each prompt twice, arriving over 22 steps; the second of each may hit."""
    return [
        Request(
            PROMPTS[BATCH[i % len(BATCH)]],
            max_tokens=ANSWER_TOKENS,
            arrival_step=2 * i,
            kv_transfer_params=options(salt="batch"),
        )
        for i in range(12)
    ]


def test_twelve_requests_at_once(stored: Engine, truth: Truth) -> None:
    for _ in range(2):  # a mix of misses and hits, then only hits
        with counting(stored) as found:
            answers = stored.submit(mixed_requests())
            stored.settle()
        for i, answer in enumerate(answers):
            assert answer.token_ids == truth[BATCH[i % len(BATCH)]].token_ids, i
    assert hit_tokens(found) == 2 * sum(len(PROMPTS[name]) // 64 * 64 for name in BATCH)


@pytest.mark.parametrize("abort_step", range(4))
def test_aborts_while_loads_are_under_way(stored: Engine, truth: Truth, abort_step: int) -> None:
    """Requests aborted a few steps after their arrival: before, during and after their loads."""
    stored.submit(mixed_requests())
    counted(stored)
    requests = mixed_requests()
    for i, request in enumerate(requests):
        request.arrival_step = i // 4
        if i % 3 == 0:
            request.abort_at_step = request.arrival_step + abort_step
    answers = stored.submit(requests)
    assert stored.settle()
    for i, answer in enumerate(answers):
        if i % 3:
            assert answer.token_ids == truth[BATCH[i % len(BATCH)]].token_ids, i
    # No block was lost: the same again gives the same, with the whole KV cache free.
    assert same(ask(stored, "five", params=ONLY_READ), truth["five"])
    usage = stored.metrics("kv_cache_usage")
    assert set(usage.values()) == {0.0}


# ---------------------------------------------------------------------- metrics
def test_metrics_add_up(stored: Engine, folder: Path) -> None:
    chunk_bytes = 64 * 2048
    new = tokens(30, 64 * 4 + 10)
    with counting(stored) as found:
        ask(stored, new)
    saved = {name: found[name] for name in ("chunks_saved", "bytes_saved")}
    assert saved == {"chunks_saved": 4, "bytes_saved": 4 * chunk_bytes}
    assert misses(found) == {"absent": 1}
    assert 1 <= found["save_seconds_count"] <= 4
    assert found["save_seconds_sum"] > 0
    with counting(stored) as found:
        ask(stored, new)
        ask(stored, "five")
    assert found['tokens_hit{tier="memory"}'] == 256 + 320
    assert found['bytes_loaded{tier="memory"}'] == (4 + 5) * chunk_bytes
    assert found["load_seconds_count"] == 2
    assert found["load_seconds_sum"] > 0
    assert found['load_seconds_bucket{le="+Inf"}'] == 2
    assert "chunks_saved" not in found
    assert not misses(found)
    vllm = stored.metrics("external_prefix_cache")
    assert vllm["vllm:external_prefix_cache_hits_total"] >= 256 + 320


# Last: should this one break the engine, the others have been told apart from it.
def test_a_cache_salt_of_any_length_is_served(stored: Engine, truth: Truth) -> None:
    """Only the HTTP server of vLLM sets a limit; the keys of the store have one."""
    for _ in range(2):
        assert same(ask(stored, "five", cache_salt="x" * 5000), truth["five"])
