"""One store through the lives of three engines: a killed one, one with two ranks, and a third.

The first stores and is killed with SIGKILL; the second (tensor parallel) loads what the first
stored and stores something else; the third loads what both stored, from each tier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.engine import Answer, Engine
from benchmarks.engine_process import shared_memory_of
from prefixstore import Store, admin
from tests.engine.support import (
    NEVER,
    ONLY_READ,
    PROMPTS,
    Metrics,
    Truth,
    ask,
    counting,
    distance,
    hit_tokens,
    misses,
    same,
    second_prompt,
    start,
    to_disk_only,
    wait_for_chunks,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

TP_ROUNDING = 1e-3  # two ranks add up partial sums in another order
DECODE_ROUNDING = 2e-2  # KV of generated tokens comes from steps of one token


@dataclass(frozen=True)
class Life:
    """What one engine answered and counted."""

    answers: dict[str, Answer]
    found: Metrics


@pytest.fixture(scope="module")
def first_life(model: Path, folder: Path) -> Life:
    """Stores "five" with a long answer, then "ten"; ends by SIGKILL."""
    engine = start(model, folder, forked=False)  # a hash seed of its own
    try:
        with counting(engine) as found:
            answers = {"first_turn": ask(engine, "five", 120), "ten": ask(engine, "ten")}
        wait_for_chunks(folder, (340 + 120 - 1) // 64 + 650 // 64)
    finally:
        engine.kill()
    return Life(answers, found)


@pytest.fixture(scope="module")
def second_life(model: Path, folder: Path, first_life: Life) -> Life:
    """Two ranks: load "five" and "ten", store "whole" and "fork"."""
    with start(model, folder, tensor_parallel_size=2) as engine:
        with counting(engine) as found:
            answers = {"cold": ask(engine, "five", params=NEVER)}
            answers |= {name: ask(engine, name) for name in ("five", "ten", "whole", "fork")}
        wait_for_chunks(folder, 7 + 10 + 6 + 3)
        shared = shared_memory_of(engine.pid)
    assert {path.name.partition("_")[0] for path in shared} == {"psm", "vllm"}
    assert not any(path.exists() for path in shared)
    return Life(answers, found)


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, second_life: Life) -> Iterator[Engine]:
    """The third engine, which found the connector through the entry point."""
    with start(model, folder, extra={"by_name": True}, forked=False) as engine:
        yield engine


def test_first_life_computes_everything(first_life: Life, truth: Truth) -> None:
    assert same(first_life.answers["first_turn"], truth.first_turn)
    assert same(first_life.answers["ten"], truth["ten"])
    assert hit_tokens(first_life.found) == 0
    assert misses(first_life.found) == {"absent": 2}
    assert first_life.found["chunks_saved"] == 7 + 10


def test_two_ranks_load_what_one_stored(second_life: Life, truth: Truth) -> None:
    for name in ("five", "ten"):
        assert distance(second_life.answers[name], truth[name]) < TP_ROUNDING
    assert hit_tokens(second_life.found, "memory") == 320 + 640 + 256
    assert distance(second_life.answers["cold"], truth["five"]) < TP_ROUNDING


def test_hits_after_a_kill_are_exact(engine: Engine, folder: Path, truth: Truth) -> None:
    for name in ("five", "ten"):
        check_hit(engine, truth, name, "memory")
    to_disk_only(folder)
    for name in ("five", "ten"):
        check_hit(engine, truth, name, "disk")


def check_hit(engine: Engine, truth: Truth, name: str, tier: str) -> None:
    with counting(engine) as found:
        answer = ask(engine, name, params=ONLY_READ)
    expected = len(PROMPTS[name]) // 64 * 64
    assert same(answer, truth[name])
    assert answer.cached_tokens == expected
    assert hit_tokens(found) == hit_tokens(found, tier) == expected
    assert "loads_failed" not in found


@pytest.mark.parametrize("name", ["whole", "fork"])
def test_one_rank_loads_what_two_stored(engine: Engine, truth: Truth, name: str) -> None:
    with counting(engine) as found:
        answer = ask(engine, name, params=ONLY_READ)
    assert distance(answer, truth[name]) < TP_ROUNDING
    assert hit_tokens(found) == len(PROMPTS[name]) // 64 * 64


def test_a_second_turn_loads_the_answer_of_the_first(engine: Engine, truth: Truth) -> None:
    with counting(engine) as found:
        answer = ask(engine, second_prompt(truth.first_turn), params=ONLY_READ)
    assert distance(answer, truth.second_turn) < DECODE_ROUNDING
    assert hit_tokens(found) == 448  # 320 of the prompt, the rest generated


def test_prompt_logprobs_are_those_of_the_whole_prompt(engine: Engine, truth: Truth) -> None:
    answer = ask(engine, "five", params=ONLY_READ, prompt_logprobs=3)
    assert same(answer, truth.prompt_logprobs)
    assert answer.prompt_logprobs == truth.prompt_logprobs.prompt_logprobs


def test_the_store_is_sound_afterwards(engine: Engine, folder: Path) -> None:
    with Store.open(folder, create=False) as store:
        report = admin.verify(store)
    assert report.sound
    assert report.chunks["disk"] == 7 + 10 + 6 + 3
