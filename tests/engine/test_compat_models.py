"""Kinds of models: mixtures of experts, sliding windows, latent attention (MLA).

The truth is the same engine told to leave the store alone (`NEVER`) or an engine without one; the
steps of all of them end at the same tokens, so answers are compared to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.engine import Answer, Engine
from tests.engine.odd_connectors import named
from tests.engine.other_models import make_other_model
from tests.engine.support import (
    ANSWER_TOKENS,
    NEVER,
    PROMPTS,
    STEP_TOKENS,
    ask,
    counting,
    damage,
    hit_tokens,
    misses,
    same,
    start,
    to_disk_only,
    wait_for_chunks,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

WINDOW = 2 * STEP_TOKENS
FIVE_TOKENS = 5 * STEP_TOKENS


def check_cold_then_hit(engine: Engine, folder: Path, name: str = "five") -> Answer:
    """Computed and stored, then loaded from each tier: always the answer without the store."""
    truth, chunks = ask(engine, name, params=NEVER), len(PROMPTS[name]) // STEP_TOKENS
    with counting(engine) as found:
        assert same(ask(engine, name), truth)
    assert misses(found) == {"absent": 1}
    assert found["chunks_saved"] == chunks
    wait_for_chunks(folder, chunks, on_disk=True)
    for tier in ("memory", "disk"):
        if tier == "disk":
            to_disk_only(folder)
        with counting(engine) as found:
            assert same(ask(engine, name), truth), tier
        assert hit_tokens(found, tier) == hit_tokens(found) == chunks * STEP_TOKENS
    return truth


def check_a_damaged_prefix_is_computed(engine: Engine, folder: Path, truth: Answer) -> None:
    """A load that fails leaves a window no usable prefix: all of it is computed, and kept again.

    Each failure finds the damage of one chunk at least, in one tier or both.
    """
    damage(folder)
    failures = 0.0
    for _ in range(2 * len(PROMPTS["five"]) // STEP_TOKENS):
        with counting(engine) as found:
            assert same(ask(engine, "five"), truth)
        failures += found.get("loads_failed", 0)
        if hit_tokens(found) == FIVE_TOKENS and "loads_failed" not in found:
            break
        engine.reset_prefix_cache()
    else:
        raise AssertionError("damaged chunks are not stored again")
    assert failures >= 1


def test_mixture_of_experts(tmp_path: Path, own_folder: Path) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = make_other_model(tmp_path / "model", "mixtral", **sizes)
    with start(model, own_folder) as engine:
        check_cold_then_hit(engine, own_folder)


def test_a_sliding_window_in_all_layers(tmp_path: Path, own_folder: Path) -> None:
    model = make_other_model(tmp_path / "model", "mistral", sliding_window=WINDOW)
    with start(model, own_folder) as engine:
        truth = check_cold_then_hit(engine, own_folder)
        check_a_damaged_prefix_is_computed(engine, own_folder, truth)


# ---------------------------------------------------------------------- windows in some layers
@pytest.fixture(scope="module")
def interleaved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3: a window in every second layer, which vLLM keeps in groups of their own."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return make_other_model(
        tmp_path_factory.mktemp("gemma") / "model", "gemma3_text", num_hidden_layers=4,
        layer_types=kinds, sliding_window=WINDOW, query_pre_attn_scalar=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def interleaved_truth(interleaved: Path) -> dict[str, Answer]:
    """The answers of vLLM without a connector."""
    with start(interleaved, None) as engine:
        return {name: ask(engine, name) for name in ("five", "ten", "whole", "fork")}


@pytest.fixture(scope="module")
def hybrid_engine(interleaved: Path, folder: Path) -> Iterator[Engine]:
    """With vLLM's prefix cache, which the tests empty where the store is to be asked."""
    with start(interleaved, folder, enable_prefix_caching=True) as engine:
        yield engine


def test_windows_in_some_layers(
    hybrid_engine: Engine, folder: Path, interleaved_truth: dict[str, Answer]
) -> None:
    """ "ten" is five windows long: of four, layers with a window have no blocks."""
    engine = hybrid_engine
    for name in ("five", "ten", "whole"):
        assert same(ask(engine, name), interleaved_truth[name])
    engine.reset_prefix_cache()
    expected = {"five": 5, "ten": 10, "whole": 5, "fork": 4}  # the last token is computed
    for name, chunks in expected.items():
        with counting(engine) as found:
            assert same(ask(engine, name), interleaved_truth[name]), name
        engine.reset_prefix_cache()
        assert hit_tokens(found) == chunks * STEP_TOKENS, name


def test_what_vllm_has_of_each_group_is_not_loaded(
    hybrid_engine: Engine, interleaved_truth: dict[str, Answer]
) -> None:
    engine = hybrid_engine
    engine.reset_prefix_cache()
    ask(engine, PROMPTS["five"][:150])
    with counting(engine) as found:
        assert same(ask(engine, "five"), interleaved_truth["five"])
    assert hit_tokens(found) == 3 * STEP_TOKENS


def test_a_failed_load_with_several_groups(
    hybrid_engine: Engine, folder: Path, interleaved_truth: dict[str, Answer]
) -> None:
    hybrid_engine.reset_prefix_cache()
    check_a_damaged_prefix_is_computed(hybrid_engine, folder, interleaved_truth["five"])


# ---------------------------------------------------------------------- MLA
@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V2 whose latent has the one size that vLLM's CPU kernel knows."""
    return make_other_model(
        tmp_path_factory.mktemp("mla") / "model", "deepseek_v2", num_key_value_heads=4,
        head_dim="absent", kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64,
        qk_nope_head_dim=64, v_head_dim=64, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, moe_intermediate_size=64, first_k_dense_replace=1, n_group=1,
        topk_group=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def latent_truth(latent: Path) -> dict[int, Answer]:
    """Answers without a connector to the first so many tokens of "five"."""
    with start(latent, None) as engine:
        return {count: ask(engine, PROMPTS["five"][:count]) for count in (FIVE_TOKENS, 340)}


def test_mla_is_refused_where_vllm_cannot_go_on_from_a_prefix(
    latent: Path, own_folder: Path, tmp_path: Path, latent_truth: dict[int, Answer]
) -> None:
    log = tmp_path / "log"
    with start(latent, own_folder, log=log) as engine:
        for _ in range(2):
            assert same(ask(engine, "five"), latent_truth[340])
        assert not any(engine.metrics("prefixstore:tokens_hit").values())
    [line] = [line for line in log.read_text().splitlines() if "without the store" in line]
    assert "MLA with chunked prefill and prefix caching both off" in line


def test_mla_latents_are_kept(
    latent: Path, own_folder: Path, latent_truth: dict[int, Answer]
) -> None:
    """With one token behind the prefix, which that backend computes by decoding: that it can.

    The truth is an answer's second token on, computed by decoding as well.
    """
    whole, truth = PROMPTS["five"][:FIVE_TOKENS], latent_truth[FIVE_TOKENS]
    config = named("Unrefusing", own_folder)
    with start(latent, None, kv_transfer_config=config) as engine:
        with counting(engine) as found:
            assert same(ask(engine, whole), truth)
        assert found["chunks_saved"] == 5
        with counting(engine) as found:
            answer = ask(engine, [*whole, truth.token_ids[0]], ANSWER_TOKENS - 1)
        assert hit_tokens(found) == FIVE_TOKENS
    assert answer.token_ids == truth.token_ids[1:]
    assert truth.logprobs is not None
    assert answer.logprobs == truth.logprobs[1:]
