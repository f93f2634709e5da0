"""Blending in real vLLM: recomputing all is exact, nobody else notices, what fails is computed.

Stored are documents behind a system prompt. Asked are prompts that use them in another order, with
tokens between them that were never seen, next to what a plain engine answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Answer, Engine, Request
from connector.messages import WHOLE
from tests.engine import odd_connectors
from tests.engine.support import (
    ANSWER_TOKENS,
    LOGPROBS,
    NEVER,
    ask,
    counted,
    counting,
    distance,
    same,
    since,
    start,
    tiny_model,
    tokens,
    wait_for_chunks,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

SYSTEM, GAP, QUESTION = tokens(104, 64), tokens(106, 20), tokens(105, 30)
DOCUMENTS = [tokens(101, 150), tokens(102, 200), tokens(103, 170)]
MIXED = SYSTEM + DOCUMENTS[2] + GAP + DOCUMENTS[0] + DOCUMENTS[1] + QUESTION
MOVED = GAP + DOCUMENTS[1] + DOCUMENTS[2] + QUESTION  # nothing exact in it
SHARED = SYSTEM + DOCUMENTS[1] + QUESTION  # exact, plain prompts of the same texts
HISTORY = {
    "brief": SYSTEM + DOCUMENTS[2] + GAP + DOCUMENTS[0] + QUESTION,
    "lone": GAP + DOCUMENTS[1] + QUESTION,
    "exact": SHARED,
}
HISTORY_TOKENS = 4
HISTORIES = 40
ALL = {"prefixstore": {"blend": {"selector": "all", "budget": 1.0}}}
NONE = {"prefixstore": {"blend": {"selector": "none"}}}
OFF = {"prefixstore": {"blend": False}}
ROUNDING = 1e-4
BLEND = {"selector": "first", "budget": 0.3, "step_rows": 128}


def warm(engine: Engine, folder: Path) -> None:
    """Store each document behind the system prompt."""
    for document in DOCUMENTS:
        ask(engine, SYSTEM + document + tokens(1, 5), params=OFF)
    wait_for_chunks(folder, 1 + sum((64 + len(d)) // 64 - 1 for d in DOCUMENTS))


def begin(model: Path, folder: Path, **changes: Any) -> Engine:
    return start(model, folder, extra={"blend": BLEND}, **changes)


@pytest.fixture(scope="module")
def deep_model() -> Path:
    return tiny_model(layers=4)


@pytest.fixture(scope="module")
def cold(deep_model: Path) -> dict[str, Any]:
    """What a plain engine answers."""
    prompts = {"mixed": MIXED, "moved": MOVED, "shared": SHARED}
    with start(deep_model, None) as engine:
        answers = {name: ask(engine, prompt) for name, prompt in prompts.items()}
        brief = {name: ask(engine, prompt, HISTORY_TOKENS) for name, prompt in HISTORY.items()}
        return {**answers, **brief}


@pytest.fixture(scope="module")
def engine(deep_model: Path, folder: Path) -> Iterator[Engine]:
    with begin(deep_model, folder, enable_prefix_caching=True) as engine:
        warm(engine, folder)
        yield engine


@pytest.fixture(autouse=True)
def no_prefix_cache(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").reset_prefix_cache()


def reused(found: dict[str, float]) -> float:
    return found.get("blend_reused_tokens", 0.0)


# ---------------------------------------------------------------------- exactness
@pytest.mark.parametrize("name", ["mixed", "moved"])
def test_recomputing_all_is_exact(engine: Engine, cold: dict[str, Any], name: str) -> None:
    prompt = {"mixed": MIXED, "moved": MOVED}[name]
    with counting(engine) as found:
        answer = ask(engine, prompt, params=ALL)
    assert distance(answer, cold[name]) < ROUNDING
    assert reused(found) > 300
    assert found["blend_recomputed_tokens"] == reused(found)
    assert found["blend_between_tokens"] >= len(GAP)


def test_blending_begins_before_all_is_loaded(
    deep_model: Path, tmp_path: Path, cold: dict[str, Any]
) -> None:
    """And what cannot be loaded then has the engine compute the request."""
    told = odd_connectors.named("OneByOne", tmp_path / "store", blend=BLEND)
    with start(deep_model, None, kv_transfer_config=told) as engine:
        warm(engine, tmp_path / "store")
        with counting(engine) as found:
            answer = ask(engine, MIXED, params=ALL)
        assert distance(answer, cold["mixed"]) < ROUNDING
        assert found["blend_recomputed_tokens"] == reused(found) > 300
        commands = json.loads((tmp_path / "early.json").read_text())
        assert any(early for early, _ in commands)
        (tmp_path / "early.json").unlink()
        some = {"prefixstore": {"blend": {"selector": "all", "budget": 0.5}}}
        with counting(engine) as found:
            answer = ask(engine, MIXED, params=some)
        commands = json.loads((tmp_path / "early.json").read_text())
        assert any(early for early, _ in commands)
        assert all(until < WHOLE for _, until in commands), "it was not ended as a blend"
        assert found.get("blend_recomputed_tokens", 0.0) == 0.0
        assert distance(answer, cold["mixed"]) < ROUNDING


def test_position_only_is_another_answer(engine: Engine, cold: dict[str, Any]) -> None:
    """That recomputing matters here: otherwise the tests above would prove nothing."""
    with counting(engine) as found:
        answer = ask(engine, MIXED, params=NONE)
    assert reused(found) > 300
    assert "blend_recomputed_tokens" not in found
    assert distance(answer, cold["mixed"]) > 100 * ROUNDING


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("steps of 64 tokens", {"max_num_batched_tokens": 64, "max_num_seqs": 8}),
        (
            "two ranks, steps of 64 tokens, prefix caching",
            {
                "tensor_parallel_size": 2,
                "enable_prefix_caching": True,
                "max_num_batched_tokens": 64,
                "max_num_seqs": 8,
            },
        ),
        ("bfloat16", {"dtype": "bfloat16"}),
    ],
)
def test_recomputing_all_is_exact_in_other_engines(
    deep_model: Path, own_folder: Path, cold: dict[str, Any], kind: str, changes: dict[str, Any]
) -> None:
    with begin(deep_model, own_folder, **changes) as other:
        truth = ask(other, MIXED, params=NEVER) if kind == "bfloat16" else cold["mixed"]
        warm(other, own_folder)
        other.reset_prefix_cache()
        before = counted(other)
        answer = ask(other, MIXED, params=ALL)
        assert reused(since(before, counted(other))) > 300
    assert distance(answer, truth) < (0.05 if kind == "bfloat16" else ROUNDING)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_recomputing_all_is_exact_for_other_architectures(own_folder: Path, kind: str) -> None:
    model = tiny_model(layers=3, arch=kind)
    with begin(model, own_folder) as other:
        truth = ask(other, MIXED, params=NEVER)
        warm(other, own_folder)
        before = counted(other)
        answer = ask(other, MIXED, params=ALL)
        assert reused(since(before, counted(other))) > 300
    assert distance(answer, truth) < ROUNDING


def test_rounded_segments(
    deep_model: Path, own_folder: Path, engine: Engine, cold: dict[str, Any]
) -> None:
    """What is recomputed is exact; what is not was rounded."""
    with start(deep_model, own_folder, extra={"blend": BLEND, "codec": "int8"}) as other:
        warm(other, own_folder)
        with counting(other) as found:
            answer = ask(other, MOVED, params=ALL)
        assert found["blend_recomputed_tokens"] == reused(found) > 300
        assert distance(answer, cold["moved"]) < ROUNDING
        with counting(other) as found:
            rounded = ask(other, MOVED, params=NONE)
        assert reused(found) > 300
    near = distance(rounded, ask(engine, MOVED, params=NONE))
    assert 0 < near < 0.2, "its bits are others, its tokens are not"
    assert not same(rounded, answer)


# ---------------------------------------------------------------------- isolation
def test_a_blend_changes_no_other_answer(engine: Engine, cold: dict[str, Any]) -> None:
    """In vLLM's own prefix cache, in the store, and in the same batch."""
    first = ask(engine, MIXED, params=NONE)
    assert distance(ask(engine, MIXED, params=NEVER), cold["mixed"]) < ROUNDING
    engine.reset_prefix_cache()
    plain, blended, shared = engine.generate(
        [MOVED, MIXED, SHARED],
        max_tokens=ANSWER_TOKENS,
        logprobs=LOGPROBS,
        kv_transfer_params=[NEVER, NONE, OFF],
    )
    assert distance(plain, cold["moved"]) < ROUNDING
    assert distance(shared, cold["shared"]) < ROUNDING
    assert distance(blended, first) < ROUNDING


def test_histories_do_not_matter(engine: Engine, cold: dict[str, Any]) -> None:
    """Permuted histories of blended and plain requests: each has one answer, to the bit.

    Any three requests come in any order in some of them. For a plain one that is the answer of an
    engine without a store, for a blended one what it gets when nobody has asked before.
    """
    query = {"blend": {"selector": "query", "budget": 0.3}}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("brief", {"blend": {"selector": "none"}}), ("brief", {"blend": False}), ("brief", query),
        ("lone", {"blend": {"selector": "none"}}), ("lone", {"blend": False}),
        ("exact", {"blend": False}),
    ]  # fmt: skip

    def answer(number: int) -> Answer:
        name, options = requests[number]
        params = {"prefixstore": {**options, "write": False}}
        return ask(engine, HISTORY[name], HISTORY_TOKENS, params=params)

    truth = {}
    for number, (name, options) in enumerate(requests):
        engine.reset_prefix_cache()
        truth[number] = cold[name] if options["blend"] is False else answer(number)
        assert (distance(truth[number], cold[name]) < ROUNDING) is (options["blend"] is False)
    histories = random.Random(5).sample(list(permutations(truth)), HISTORIES)
    seen = {three for order in histories for three in combinations(order, 3)}
    assert seen == set(permutations(truth, 3))
    for order in histories:
        engine.reset_prefix_cache()
        for number in order:
            assert same(answer(number), truth[number]), (order, number)


# ---------------------------------------------------------------------- trouble
def test_aborted_blends_leave_nothing(engine: Engine, cold: dict[str, Any]) -> None:
    requests = [
        Request(
            prompt=MIXED, max_tokens=ANSWER_TOKENS, logprobs=LOGPROBS, kv_transfer_params=NONE,
            abort_at_step=1 + number,
        )
        for number in range(8)
    ]  # fmt: skip
    engine.submit(requests)
    assert engine.settle()
    engine.reset_prefix_cache()
    assert distance(ask(engine, MIXED, params=ALL), cold["mixed"]) < ROUNDING


def test_preempted_blends_end_right(
    deep_model: Path, own_folder: Path, cold: dict[str, Any]
) -> None:
    """A KV cache that holds two of the prompts, but not their answers too."""
    room = 48 * 32 * 4096 / 2**30  # 48 blocks of 32 tokens of 4 KiB
    with begin(deep_model, own_folder, kv_cache_gib=room, max_model_len=1024) as other:
        warm(other, own_folder)
        answers = other.generate(
            [MIXED, MIXED, MOVED],
            max_tokens=240,
            logprobs=LOGPROBS,
            kv_transfer_params=[ALL, ALL, ALL],
        )
        preemptions = other.metrics("num_preemptions")
    assert sum(preemptions.values()) > 0
    for answer, name in zip(answers, ("mixed", "mixed", "moved"), strict=True):
        assert len(answer.token_ids) == 240
        assert answer.token_ids[:ANSWER_TOKENS] == cold[name].token_ids


def test_a_damaged_segment_is_computed(
    deep_model: Path, own_folder: Path, cold: dict[str, Any]
) -> None:
    """Each stored chunk of the disk and memory tiers has a byte flipped."""
    with begin(deep_model, own_folder) as other:
        warm(other, own_folder)
        flip_everything(own_folder)
        before = counted(other)
        answer = ask(other, MOVED, params=NONE)
        assert reused(since(before, counted(other))) > 300  # it was claimed
    assert distance(answer, cold["moved"]) < ROUNDING


def flip_everything(folder: Path) -> None:
    from prefixstore import Store
    from prefixstore.ledger import DISK, MEMORY

    with Store.open(folder, create=False) as store:
        assert store.flush()
        for tier in (MEMORY, DISK):
            where = store.live_dir if tier == MEMORY else folder
            for path in where.glob("*.slots"):
                size = int(path.stem.rpartition("-")[2])
                with open(path, "r+b") as file:
                    for at in range(0, path.stat().st_size, size):
                        file.seek(at + 100)
                        byte = file.read(1)
                        file.seek(at + 100)
                        file.write(bytes([byte[0] ^ 0x20]) if byte else b"")


# ---------------------------------------------------------------------- settings
def test_mistakes_of_a_request_reach_the_client(engine: Engine, cold: dict[str, Any]) -> None:
    for blend, message in (
        ({"selector": "best"}, "no selector 'best'"),
        ({"budget": 2}, "budget of 2"),
        ({"selector": "deviation", "budget": 0.1}, "before it can choose"),
        ({"speed": 1}, "unknown entries"),
    ):
        answer = ask(engine, MIXED, params={"prefixstore": {"blend": blend}})
        assert answer.params is not None
        assert message in answer.params["prefixstore"]["error"]
        assert distance(answer, cold["mixed"]) < ROUNDING


def test_blending_is_opt_in(deep_model: Path, own_folder: Path, cold: dict[str, Any]) -> None:
    with start(deep_model, own_folder) as other:
        warm(other, own_folder)
        before = counted(other)
        answer = ask(other, MIXED)
        assert reused(since(before, counted(other))) == 0
        refused = ask(other, MIXED, params=ALL)
        assert refused.params is not None
        assert "blend is off" in refused.params["prefixstore"]["error"]
    assert distance(answer, cold["mixed"]) < ROUNDING


def test_a_damaged_exact_chunk_is_not_served(deep_model: Path, own_folder: Path) -> None:
    """Behind it stand segments: what fails first must be computed, and is nobody's afterwards."""
    with begin(deep_model, own_folder, enable_prefix_caching=True) as other:
        truth = ask(other, MIXED, params=NEVER)
        other.reset_prefix_cache()
        warm(other, own_folder)
        other.reset_prefix_cache()
        flip_everything(own_folder)
        assert distance(ask(other, MIXED, params=NONE), truth) < ROUNDING
        assert distance(ask(other, MIXED, params=NEVER), truth) < ROUNDING


def test_the_last_block_of_a_prompt_is_kept_apart(deep_model: Path, own_folder: Path) -> None:
    """All that is blended lies in one block that the answer completes."""
    prompt = [*SYSTEM, *DOCUMENTS[2][:64], *DOCUMENTS[1][30:110]]
    with begin(deep_model, own_folder, enable_prefix_caching=True, block_size=128) as other:
        for document in DOCUMENTS:
            ask(other, SYSTEM + document + tokens(1, 90), params=OFF)
        wait_for_chunks(own_folder, 6)
        other.reset_prefix_cache()
        truth = ask(other, prompt, 60, params=NEVER)
        other.reset_prefix_cache()
        before = counted(other)
        blended = ask(other, prompt, 60, params=NONE)
        assert reused(since(before, counted(other))) > 60
        assert distance(blended, truth) > 100 * ROUNDING
        again = ask(other, prompt + truth.token_ids[:55], 4, params=NEVER)
        assert again.token_ids == truth.token_ids[55:59]
