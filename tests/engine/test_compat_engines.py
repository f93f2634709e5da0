"""Ways to run an engine: speculative decoding, images, KV of 8 bits.

(Tensor parallel: ``test_restart``; pipeline stages: ``test_server``; LoRA:
``test_identity_of_engines``; vLLM's own prefix cache: ``test_prefix_caching``; chunked prefill:
every test here, for prompts take several steps.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.engine import Answer, Engine, Request
from tests.engine.other_models import IMAGE_TOKENS, make_seeing_model
from tests.engine.support import (
    ANSWER_TOKENS,
    LOGPROBS,
    NEVER,
    ONLY_READ,
    PROMPTS,
    STEP_TOKENS,
    Truth,
    ask,
    counting,
    distance,
    hit_tokens,
    misses,
    same,
    start,
    tiny_model,
    tokens,
)
from tests.engine.test_compat_models import FIVE_TOKENS, check_cold_then_hit

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


# ---------------------------------------------------------------------- speculative decoding
def repeating() -> list[int]:
    """A prompt whose end an n-gram drafter finds again further up."""
    return tokens(31, 200) + tokens(32, 60) + tokens(32, 60)


def drafted(engine: Engine) -> float:
    """Tokens guessed so far."""
    return sum(engine.metrics("spec_decode_num_draft_tokens_total").values())


def check_drafting(engine: Engine, truth: Truth) -> None:
    """Answers are those without drafts; a hit changes none of them, nor an answer behind one."""
    prompts: dict[str, Any] = {"five": PROMPTS["five"], "repeating": repeating()}
    first = {}
    for name, prompt in prompts.items():
        first[name] = ask(engine, prompt, 120)
        with counting(engine) as found:
            assert ask(engine, prompt, 120).token_ids == first[name].token_ids, name
        assert hit_tokens(found) == len(prompt) // STEP_TOKENS * STEP_TOKENS, name
    assert first["five"].token_ids == truth.first_turn.token_ids
    assert drafted(engine) > 0
    turn = prompts["five"] + first["five"].token_ids + tokens(33, 30)
    cold = ask(engine, turn, params=NEVER)
    with counting(engine) as found:
        assert ask(engine, turn).token_ids == cold.token_ids
    assert hit_tokens(found) == (340 + 120 - 1) // STEP_TOKENS * STEP_TOKENS


def test_drafts_by_ngrams(model: Path, own_folder: Path, truth: Truth) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with start(model, own_folder, speculative_config=drafts) as engine:
        check_drafting(engine, truth)


def test_drafts_by_a_model(model: Path, own_folder: Path, truth: Truth) -> None:
    """Its layers have the names and sizes of the model's own; what is stored is the model's."""
    drafts: dict[str, Any] = {"method": "draft_model", "num_speculative_tokens": 3}
    drafts |= {"model": str(tiny_model(layers=1, seed=1)), "max_model_len": 2048}
    with start(model, own_folder, speculative_config=drafts) as engine:
        check_drafting(engine, truth)
    with start(model, own_folder) as engine:
        with counting(engine) as found:
            assert distance(ask(engine, "five", params=ONLY_READ), truth["five"]) == 0
        assert hit_tokens(found) == FIVE_TOKENS


# ---------------------------------------------------------------------- images
def look(engine: Engine, image: Path, params: dict[str, Any] | None = None) -> Answer:
    """The same text with an image."""
    request = Request(
        tokens(41, 200), ANSWER_TOKENS, LOGPROBS, image=str(image), kv_transfer_params=params
    )
    [answer] = engine.submit([request])
    engine.settle()
    return answer


def test_images_are_part_of_the_prefix(tmp_path: Path, own_folder: Path) -> None:
    images = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(images):
        pixels = np.random.default_rng(i % 2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    hit = (IMAGE_TOKENS + 200) // STEP_TOKENS * STEP_TOKENS
    model = make_seeing_model(tmp_path / "model")
    with start(model, own_folder) as engine:
        truth = [look(engine, path, NEVER) for path in images]
        assert same(truth[0], truth[2])
        assert not same(truth[0], truth[1])
        expected = [0, 0, hit, hit, hit]  # the third file shows what the first shows
        for i, tokens_hit in zip((0, 1, 0, 1, 2), expected, strict=True):
            with counting(engine) as found:
                assert same(look(engine, images[i]), truth[i])
            assert hit_tokens(found) == tokens_hit
            assert misses(found) == ({} if tokens_hit else {"absent": 1})


# ---------------------------------------------------------------------- KV of 8 bits
@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(),
    reason="vLLM keeps FP8 KV on CPUs with AVX-512 or AMX only",
)
def test_kv_of_8_bits(model: Path, own_folder: Path) -> None:
    with start(model, own_folder, kv_cache_dtype="fp8") as engine:
        check_cold_then_hit(engine, own_folder)
