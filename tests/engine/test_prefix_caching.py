"""With vLLM's own prefix cache on: the store gives only what vLLM does not have; preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Engine, Request
from tests.engine.support import (
    ONLY_READ,
    PROMPTS,
    Truth,
    ask,
    counted,
    counting,
    hit_tokens,
    misses,
    same,
    start,
    totals,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

TOKEN_BYTES = 2 * 2 * 2 * 64 * 4  # layers, K and V, heads, head size, float32
BATCH = [name for name in PROMPTS if name.startswith("batch")]


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, truth: Truth) -> Iterator[Engine]:
    """An engine whose store holds "five" and "fork", and whose own cache is empty."""
    with start(model, folder, enable_prefix_caching=True) as engine:
        for name in ("five", "fork"):
            assert same(ask(engine, name), truth[name])
        counted(engine)
        yield engine


@pytest.fixture(autouse=True)
def _forget(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine").reset_prefix_cache()


def test_what_vllm_has_is_not_loaded(engine: Engine, truth: Truth) -> None:
    with counting(engine) as found:
        first, second = ask(engine, "five"), ask(engine, "five")
    assert same(first, truth["five"])
    assert same(second, truth["five"])
    assert (first.cached_tokens, second.cached_tokens) == (320, 320)
    assert hit_tokens(found) == 320
    assert misses(found) == {"not_needed": 1}


def test_only_the_rest_is_loaded(engine: Engine, truth: Truth) -> None:
    ask(engine, "five")
    with counting(engine) as found:
        answer = ask(engine, "fork")
    assert same(answer, truth["fork"])
    assert answer.cached_tokens == 448
    assert hit_tokens(found) == 448 - 256  # the four chunks of "five" are vLLM's


def test_a_local_hit_that_ends_within_a_chunk(engine: Engine, truth: Truth) -> None:
    assert same(ask(engine, "midway", params={"prefixstore": {"read": False}}), truth["midway"])
    with counting(engine) as found:
        answer = ask(engine, "five")
    assert same(answer, truth["five"])
    assert answer.cached_tokens == 320
    # Three blocks of 32 are vLLM's. The second chunk is read whole, its first block not written.
    assert found['tokens_hit{tier="memory"}'] in (320 - 96, 320 - 64)
    assert found['bytes_loaded{tier="memory"}'] == 4 * 64 * 2048
    again = ask(engine, "midway", params=ONLY_READ)
    assert same(again, truth["midway"])


def test_twelve_requests_at_once(engine: Engine, truth: Truth) -> None:
    def requests() -> list[Request]:
        return [
            Request(PROMPTS[BATCH[i % len(BATCH)]], max_tokens=8, arrival_step=3 * (i // 2))
            for i in range(12)
        ]

    for _ in range(3):
        for i, answer in enumerate(engine.submit(requests())):
            assert answer.token_ids == truth[BATCH[i % len(BATCH)]].token_ids, i
        counted(engine)
        assert engine.reset_prefix_cache()


def test_a_reset_of_the_connector_begins_anew(engine: Engine, truth: Truth) -> None:
    """As after an update of the weights. The last test of this engine: its prompts are gone."""
    with counting(engine) as found:
        assert same(ask(engine, "five", params=ONLY_READ), truth["five"])
    assert hit_tokens(found) == 320  # vLLM's own cache is empty, the store is not
    assert engine.reset_prefix_cache(reset_connector=True)
    with counting(engine) as found:
        assert same(ask(engine, "five"), truth["five"])
    assert misses(found) == {"absent": 1}
    assert hit_tokens(found) == 0
    assert found["chunks_saved"] == 5
    assert engine.reset_prefix_cache()
    with counting(engine) as found:
        assert same(ask(engine, "five"), truth["five"])
    assert hit_tokens(found) == 320
    assert "chunks_saved" not in found


def test_preempted_requests_answer_as_if_they_had_not_been(
    model: Path, own_folder: Path, truth: Truth
) -> None:
    """A KV cache of 1280 tokens for requests that want 2200: some are preempted and come back."""
    expected = {**truth.long, "five": truth.first_turn, "fork": truth["fork"]}
    limits: dict[str, Any] = {
        "kv_cache_gib": 1280 * TOKEN_BYTES / 2**30,
        "max_model_len": 1024,
        "enable_prefix_caching": True,
    }
    requests = [
        Request(PROMPTS[name], max_tokens=len(answer.token_ids), arrival_step=i)
        for i, (name, answer) in enumerate(expected.items())
    ]
    with start(model, own_folder, **limits) as engine:
        for _ in range(2):
            answers = engine.submit(requests)
            for name, answer in zip(expected, answers, strict=True):
                assert answer.token_ids == expected[name].token_ids, name
            counted(engine)
        preemptions = engine.metrics("num_preemptions")
        assert hit_tokens(totals(engine)) > 0
    assert preemptions["vllm:num_preemptions_total"] > 0
