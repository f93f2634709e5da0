"""CS-MQAR prompts with each chunk encoded alone, ready to be blended: for `benchmarks.quality`.

BOS and the first chunk are an exact prefix; the other chunks are reused, the queries are fresh.
Reused K and V are of a pass in which a chunk sees only BOS and itself, at its place in the prompt,
which is what rotating it there would give (tests/blend).  A chunk's staleness is measured as
`prefixstore warm` does it: behind one other text of the same collection, here another prompt's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
    chunk = torch.where(
        place < spec.context_tokens, (place - 1).div(length, rounding_mode="floor"), -1
    )
    chunk[0] = -1
    is_query = place >= spec.context_tokens
    causal = place[None, :] <= place[:, None]
    alone = causal & (
        (chunk[:, None] == chunk[None, :]) | (place == 0)[None, :] | is_query[:, None]
    )
    cached = reference.forward(model, ids, alone).key_values
    positions = torch.from_numpy(batch.answer_positions.astype("int64")).to(device)
    return Case(
        reused=Reused(
            ids=ids,
            cached=cached,
            candidates=chunk > 0,
            fresh=is_query,
            offsets=(place - 1) % length,
            staleness=_staleness(model, ids, cached, spec),
        ),
        answers=ids[:, positions + 1],
        answer_positions=positions,
        asked=torch.from_numpy(batch.asked).to(device),
        cross=torch.from_numpy(batch.cross).to(device),
        full=reference.forward(model, ids),
    )


def _staleness(model: Any, ids: Tensor, cached: KeyValues, spec: Spec) -> Tensor:
    """float32 [batch, tokens]: change of K and V behind the next prompt's chunk of that number."""
    rope = Rope.from_config(check_model(model).to_dict())
    size, length = len(ids), spec.chunk_tokens
    result = torch.zeros(ids.shape, device=ids.device)
    for number in range(1, spec.chunks):
        here = slice(1 + number * length, 1 + (number + 1) * length)
        foreign = ids.roll(1, 0)[:, here]
        behind = reference.forward(model, torch.cat([ids[:, :1], foreign, ids[:, here]], 1))
        delta = (number - 1) * length
        for (old_k, old_v), (new_k, new_v) in zip(cached, behind.key_values, strict=True):
            flat = new_k[:, :, 1 + length :].transpose(1, 2).flatten(0, 1)
            moved = rope.rotate(flat, delta).unflatten(0, (size, length)).transpose(1, 2)
            for old, new in (
                (old_k[:, :, here], moved),
                (old_v[:, :, here], new_v[:, :, 1 + length :]),
            ):
                scale = (old.float() ** 2).sum((1, 3)).mean(1, keepdim=True).clamp_min(1e-20)
                result[:, here] += ((new.float() - old.float()) ** 2).sum((1, 3)) / scale
    return result
