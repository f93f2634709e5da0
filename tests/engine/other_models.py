"""Tiny models of architectures that `benchmarks.model` does not make, with random weights.

Hugging Face's own classes write them, so names and shapes are those of real checkpoints. The scale
of the weights is that of `benchmarks.model`: heads look at few positions and the best token leads,
so that a wrong KV shows in the answer.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedModel,
)

from tests.engine.support import VOCAB, tiny_model

_SCORE_GAIN = 1.6
_LOGIT_GAIN = 3.0
_NOISE = 0.1  # of vectors, around the value the architecture starts them from
_DECAY = -4.0  # logarithm of how fast a state forgets: hardly, within a prompt
MAX_LEN = 2048

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_LEN,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
    "dtype": "float32",
}


def make_other_model(folder: Path, model_type: str, **settings: Any) -> Path:
    """Write a model of that type to a new folder; ``settings`` are entries of its config."""
    values = {name: value for name, value in {**_COMMON, **settings}.items() if value != "absent"}
    config = AutoConfig.for_model(model_type, **values)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model() / name, folder / name)
    return folder


IMAGE_TOKENS = 16


def make_seeing_model(folder: Path) -> Path:
    """A BLIP-2: vLLM puts `IMAGE_TOKENS` tokens before a prompt with an image.

    (LLaVA, Qwen-VL and others need torchvision, of which there is no build that goes with these
    tests' torch.)
    """
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text = OPTConfig(
        vocab_size=VOCAB + 64, hidden_size=128, word_embed_proj_dim=128, ffn_dim=256,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=MAX_LEN,
        tie_word_embeddings=False, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**size, num_attention_heads=2, image_size=32, patch_size=8),
        qformer_config=Blip2QFormerConfig(
            **size, num_attention_heads=2, encoder_hidden_size=64, cross_attention_frequency=1
        ),
        text_config=text,
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=VOCAB,
        tie_word_embeddings=False,
    )
    model = Blip2ForConditionalGeneration(config)
    fill(model)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<image>") == VOCAB
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    Blip2Processor(images, tokenizer, num_query_tokens=IMAGE_TOKENS).save_pretrained(folder)
    return folder


def fill(model: PreTrainedModel) -> None:
    """Random weights, each seeded by its name."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            values = torch.from_numpy(rng.standard_normal(weight.shape, dtype=np.float32))
            weight.copy_(values * _scale(name, weight) + (weight if weight.dim() < 2 else 0.0))
            if name.endswith("A_log"):
                weight.fill_(_DECAY)


def _scale(name: str, weight: torch.Tensor) -> float:
    if weight.dim() < 2:
        return _NOISE
    if "embed" in name:
        return 1.0
    # Transformers stacks the experts of a layer: [expert, out, in].
    sizes = weight.shape[2:] if weight.dim() == 3 else weight.shape[1:]
    wide: float = sizes.numel() ** -0.5
    if "lm_head" in name:
        return _LOGIT_GAIN * wide
    return (_SCORE_GAIN if any(f"{part}_proj" in name for part in "qk") else 1.0) * wide
