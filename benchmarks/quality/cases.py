"""CS-MQAR prompts with each chunk encoded alone, ready to be blended: for `benchmarks.quality`.

BOS and the first chunk are an exact prefix; the other chunks are reused, the queries are fresh.
A reused chunk was encoded right behind BOS, and its K rotated to its place in the prompt.  Its
staleness was measured behind one other text of the same collection, here the next prompt's chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from benchmarks.quality.csmqar import Family, Spec, held_out_rng, make_batch
from blend import reference
from blend.hf import check_model
from blend.reference import KeyValues, Reused
from blend.rope import Rope


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of prompts of one family: ``asked`` and ``cross`` are bool [batch, queries]."""

    reused: Reused
    answers: Tensor  # int64 [batch, queries]
    answer_positions: Tensor  # int64 [queries]
    asked: Tensor
    cross: Tensor
    full: reference.Trace


def load(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model for evaluation."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval().requires_grad_(False)


@torch.inference_mode()
def make_case(model: Any, family: Family, chunks: int, size: int, seed: int, queries: int) -> Case:
    """Prompts of a held-out seed."""
    spec = Spec(family=family, chunks=chunks)
    batch = make_batch(held_out_rng(seed), size, spec, queries)
    device = model.device
    ids = torch.from_numpy(batch.tokens.astype("int64")).to(device)
    tokens, length = ids.shape[1], spec.chunk_tokens
    place = torch.arange(tokens, device=device)
    is_query = place >= spec.context_tokens
    cached, staleness = _reused(model, ids, spec)
    positions = torch.from_numpy(batch.answer_positions.astype("int64")).to(device)
    return Case(
        reused=Reused(
            ids=ids,
            cached=cached,
            candidates=~is_query & (place > length),
            fresh=is_query,
            offsets=(place - 1) % length,
            staleness=staleness,
        ),
        answers=ids[:, positions + 1],
        answer_positions=positions,
        asked=torch.from_numpy(batch.asked).to(device),
        cross=torch.from_numpy(batch.cross).to(device),
        full=reference.forward(model, ids),
    )


def _reused(model: Any, ids: Tensor, spec: Spec) -> tuple[KeyValues, Tensor]:
    """K and V of each chunk as encoded alone, moved to its place; float32 [batch, tokens] of
    staleness."""
    rope = Rope.from_config(check_model(model).to_dict())
    length = spec.chunk_tokens
    full = reference.forward(model, ids[:, : 1 + length]).key_values
    room = ids.shape[1] - 1 - length
    cached = [(pad(key, (0, 0, 0, room)), pad(value, (0, 0, 0, room))) for key, value in full]
    staleness = torch.zeros(ids.shape, device=ids.device)
    for number in range(1, spec.chunks):
        here = slice(1 + number * length, 1 + (number + 1) * length)
        bos, text, foreign = ids[:, :1], ids[:, here], ids.roll(1, 0)[:, here]
        alone = reference.forward(model, torch.cat([bos, text], 1)).key_values
        behind = reference.forward(model, torch.cat([bos, foreign, text], 1)).key_values
        for (keys, values), one, two in zip(cached, alone, behind, strict=True):
            old_key, old_value = (part[:, :, 1:] for part in one)
            new_key, new_value = (part[:, :, 1 + length :] for part in two)
            keys[:, :, here] = _moved(rope, old_key, number * length)
            values[:, :, here] = old_value
            for old, new in ((_moved(rope, old_key, length), new_key), (old_value, new_value)):
                size = (old.float() ** 2).sum((1, 3)).mean(1, keepdim=True).clamp_min(1e-20)
                change = ((new.float() - old.float()) ** 2).sum((1, 3))
                staleness[:, here] += change / size
    return cached, staleness


def _moved(rope: Rope, keys: Tensor, delta: int) -> Tensor:
    """K [batch, heads, tokens, size] as if its tokens stood ``delta`` positions further on."""
    return rope.rotate(keys.transpose(1, 2), delta).transpose(1, 2)
