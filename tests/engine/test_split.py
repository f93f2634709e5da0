"""``load: both`` in real vLLM: whatever is computed and whatever loaded, answers are cold ones.

The store is read as slowly as a test says, and loses what it says (`odd_connectors.Paced`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Answer, Engine, Request
from prefixstore import Store, admin
from tests.engine import odd_connectors
from tests.engine.support import (
    ANSWER_TOKENS,
    CHUNK_TOKENS,
    LOGPROBS,
    NEVER,
    ONLY_READ,
    ONLY_WRITE,
    Metrics,
    ask,
    counting,
    distance,
    hit_tokens,
    start,
    tiny_model,
    to_disk_only,
    tokens,
    wait_for_chunks,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

CHUNKS = 20
PREFIX = CHUNKS * CHUNK_TOKENS
PROMPTS = [tokens(seed, PREFIX + 10) for seed in (301, 302)]
DAMAGED = tokens(303, PREFIX + 10)
LOST = 9  # of the chunks: those behind it are loaded, it and those before are computed
ROUNDING = 1e-4


@dataclass(frozen=True)
class Stored:
    """The prompts in a store on disk, and what a plain engine answers."""

    model: Path
    folder: Path
    truth: list[Answer]
    of_damaged: Answer

    def begin(self, **changes: Any) -> Engine:
        extra = {"load": "both", **changes.pop("extra", {})}
        told = odd_connectors.named("Paced", self.folder, **extra)
        self.pace()
        return start(self.model, None, kv_transfer_config=told, **changes)

    def pace(
        self, chunk_s: float = 0.0, layer_s: float = 0.0, lost: Sequence[int] = (), *,
        waits: bool = False,
    ) -> None:  # fmt: skip
        told = {"chunk_s": chunk_s, "layer_s": layer_s, "lost": lost, "waits": waits}
        (self.folder.parent / "pace").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def stored(folder: Path) -> Stored:
    model = tiny_model(layers=4)
    with start(model, folder) as engine:
        *truth, damaged = [ask(engine, prompt, params=NEVER) for prompt in [*PROMPTS, DAMAGED]]
        for prompt in [*PROMPTS, DAMAGED]:
            ask(engine, prompt, params=ONLY_WRITE)
        wait_for_chunks(folder, 3 * CHUNKS, on_disk=True)
    to_disk_only(folder)
    return Stored(model, folder, truth, damaged)


@pytest.fixture(scope="module")
def engine(stored: Stored) -> Iterator[Engine]:
    with stored.begin(enable_prefix_caching=True) as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_prefix_cache(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").reset_prefix_cache()


def computed_of(engine: Engine, prompt: list[int], truth: Answer) -> tuple[float, Metrics]:
    """Ask, compare, and return how many tokens of the prefix were computed."""
    with counting(engine) as found:
        answer = ask(engine, prompt, params=ONLY_READ)
    assert distance(answer, truth) < ROUNDING
    assert answer.cached_tokens == hit_tokens(found) == PREFIX
    assert not {"blends_failed", "loads_failed"} & found.keys()
    return found.get("split_computed_tokens", 0.0), found


# ---------------------------------------------------------------------- where they meet
def test_they_meet_in_the_middle(engine: Engine, stored: Stored) -> None:
    stored.pace(0.02, 0.01)
    computed, _ = computed_of(engine, PROMPTS[0], stored.truth[0])
    assert 0 < computed < PREFIX


def test_all_is_loaded_from_a_tier_so_fast(engine: Engine, stored: Stored) -> None:
    stored.pace(waits=True)
    computed, _ = computed_of(engine, PROMPTS[0], stored.truth[0])
    assert computed == 0


def test_all_is_computed_before_a_tier_so_slow(engine: Engine, stored: Stored) -> None:
    """Nobody waits for the thread that reads, and it does no harm to whoever comes next."""
    stored.pace(1.0, lost=[CHUNKS - 1])
    computed, _ = computed_of(engine, PROMPTS[0], stored.truth[0])
    assert computed == PREFIX
    stored.pace()
    computed_of(engine, PROMPTS[1], stored.truth[1])


def test_what_is_split_is_good_for_others(engine: Engine, stored: Stored) -> None:
    """It is exact: vLLM's own prefix cache keeps it, under its usual name."""
    stored.pace(0.01, 0.005)
    computed_of(engine, PROMPTS[0], stored.truth[0])
    with counting(engine) as found:
        answer = ask(engine, PROMPTS[0], params=ONLY_READ)
    assert distance(answer, stored.truth[0]) < ROUNDING
    assert answer.cached_tokens is not None
    assert answer.cached_tokens >= PREFIX
    assert hit_tokens(found) == 0


# ---------------------------------------------------------------------- trouble
def test_what_is_missing_is_computed_with_all_before_it(engine: Engine, stored: Stored) -> None:
    stored.pace(lost=[LOST], waits=True)
    computed, _ = computed_of(engine, PROMPTS[0], stored.truth[0])
    assert computed == (LOST + 1) * CHUNK_TOKENS


def test_what_is_damaged_is_computed_with_all_before_it(engine: Engine, stored: Stored) -> None:
    damage_one(stored.folder, DAMAGED, LOST)
    stored.pace(waits=True)
    computed, _ = computed_of(engine, DAMAGED, stored.of_damaged)
    assert computed == (LOST + 1) * CHUNK_TOKENS


def damage_one(folder: Path, prompt: list[int], number: int) -> None:
    """Flip a byte of one chunk of a prompt, on disk."""
    with Store.open(folder, create=False) as store:
        [record] = store.namespaces()
        ref = store.namespace(record.identity, record.layout).chain(prompt).refs()[number]
        [row] = [chunk.row for chunk in admin.list_chunks(store) if chunk.key == ref.key]
    [path] = folder.glob(f"*-{row.slot_bytes}.slots")
    with path.open("r+b", buffering=0) as file:
        at = row.slot * row.slot_bytes + 1000
        [byte] = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 0x10]), at)


def test_aborted_splits_leave_nothing(engine: Engine, stored: Stored) -> None:
    stored.pace(0.01, 0.005)
    for number in range(1, 7):
        request = Request(
            PROMPTS[0], 2, kv_transfer_params=ONLY_READ, abort_at_step=number,
        )  # fmt: skip
        engine.submit([request])
        assert engine.settle()
    engine.reset_prefix_cache()
    computed_of(engine, PROMPTS[1], stored.truth[1])


def both_at_once(engine: Engine, stored: Stored, first: Any) -> None:
    """Ask for both prompts, with ``first`` as the parameters of the first one."""
    answers = engine.generate(
        PROMPTS, max_tokens=ANSWER_TOKENS, logprobs=LOGPROBS, kv_transfer_params=[first, ONLY_READ]
    )
    for answer, truth in zip(answers, stored.truth, strict=True):
        assert distance(answer, truth) < ROUNDING


def test_two_at_once(engine: Engine, stored: Stored) -> None:
    stored.pace(0.005, 0.005)
    with counting(engine) as found:
        both_at_once(engine, stored, ONLY_READ)
    assert hit_tokens(found) == 2 * PREFIX
    assert found["split_computed_tokens"] > 0


# ---------------------------------------------------------------------- other engines
def test_two_ranks_compute_the_same_rows(stored: Stored) -> None:
    """In many slices, beside another request that is answered meanwhile."""
    changes = {"tensor_parallel_size": 2, "extra": {"blend": {"step_rows": 64}}}
    with stored.begin(**changes) as engine:
        stored.pace(0.02, 0.01)
        computed, _ = computed_of(engine, PROMPTS[0], stored.truth[0])
        assert 0 < computed < PREFIX
        stored.pace(lost=[LOST], waits=True)
        computed, _ = computed_of(engine, PROMPTS[1], stored.truth[1])
        assert computed == (LOST + 1) * CHUNK_TOKENS
        stored.pace(0.01, 0.005)
        both_at_once(engine, stored, NEVER)


def test_where_rows_cannot_be_computed_it_is_auto(stored: Stored) -> None:
    """The log says so, once."""
    with stored.begin(kv_cache_dtype="fp8") as engine:
        assert "split_computed_tokens" not in engine.metrics("prefixstore")
        lines = [line for line in engine.log.read_text().splitlines() if '"both" is as' in line]
    assert len(lines) == 1
    assert "its KV cache is fp8" in lines[0]
