"""CS-MQAR prompts with each chunk encoded alone, ready to be blended: for `benchmarks.quality`.

BOS and the first chunk are an exact prefix; the other chunks are reused, the queries are fresh.
A reused chunk was encoded right behind BOS, and its K rotated to its place in the prompt; or, as
a source from the middle of another prompt is, behind BOS and other texts.  Its staleness was
measured behind texts of the same collection that are in none of the prompts.
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
from blend.staleness import Encoded, staleness
from prefixstore.warm_contexts import CONTEXTS

CONTEXT_TEXTS = 4  # chunks that staleness is measured behind, for each of CONTEXTS times
_OTHER_SEEDS = 1000  # from this one on: texts of the collection that are in no prompt
_MIDDLE_SEEDS = 2000  # likewise; those before a source from the middle of a prompt


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
def make_case(
    model: Any,
    family: Family,
    chunks: int,
    size: int,
    seed: int,
    queries: int,
    *,
    alone: bool = True,
) -> Case:
    """Prompts of a held-out seed. ``alone``: what is reused was encoded behind BOS alone."""
    spec = Spec(family=family, chunks=chunks)
    batch = make_batch(held_out_rng(seed), size, spec, queries)
    device = model.device
    ids = torch.from_numpy(batch.tokens.astype("int64")).to(device)
    tokens, length = ids.shape[1], spec.chunk_tokens
    place = torch.arange(tokens, device=device)
    is_query = place >= spec.context_tokens
    contexts = [each.to(device) for each in make_contexts(spec, size, _OTHER_SEEDS + seed)]
    middle = make_contexts(spec, size, _MIDDLE_SEEDS + seed)[0].to(device)
    front = ids[:, :1] if alone else torch.cat([ids[:, :1], middle], 1)
    cached, moves = _reused(model, ids, front, contexts, spec)
    positions = torch.from_numpy(batch.answer_positions.astype("int64")).to(device)
    return Case(
        reused=Reused(
            ids=ids,
            cached=cached,
            candidates=~is_query & (place > length),
            fresh=is_query,
            offsets=(place - 1) % length,
            staleness=moves,
        ),
        answers=ids[:, positions + 1],
        answer_positions=positions,
        asked=torch.from_numpy(batch.asked).to(device),
        cross=torch.from_numpy(batch.cross).to(device),
        full=reference.forward(model, ids),
    )


def make_contexts(spec: Spec, size: int, seed: int) -> list[Tensor]:
    """Texts to stand before a chunk, each several chunks of other prompts: [size, tokens]."""
    others = make_batch(held_out_rng(seed), size, spec, 1).tokens
    chunks = torch.from_numpy(others[:, 1 : spec.context_tokens].astype("int64"))
    chunks = chunks.unflatten(1, (spec.chunks, spec.chunk_tokens))
    texts = [chunks.roll(i, 0)[:, i % spec.chunks] for i in range(CONTEXTS * CONTEXT_TEXTS)]
    return [
        torch.cat(texts[at : at + CONTEXT_TEXTS], 1) for at in range(0, len(texts), CONTEXT_TEXTS)
    ]


def _reused(
    model: Any, ids: Tensor, front: Tensor, contexts: list[Tensor], spec: Spec
) -> tuple[KeyValues, Tensor]:
    """K and V of each chunk as encoded behind ``front``, moved to its place; float32 [batch,
    tokens] of staleness."""
    rope = Rope.from_config(check_model(model).to_dict())
    length = spec.chunk_tokens
    full = reference.forward(model, ids[:, : 1 + length]).key_values
    room = ids.shape[1] - 1 - length
    cached = [(pad(key, (0, 0, 0, room)), pad(value, (0, 0, 0, room))) for key, value in full]
    moves = torch.zeros(ids.shape, device=ids.device)
    for number in range(1, spec.chunks):
        here = slice(1 + number * length, 1 + (number + 1) * length)
        bos, text = ids[:, :1], ids[:, here]
        source = _encoded(model, front, text)
        behind = [_encoded(model, torch.cat([bos, context], 1), text) for context in contexts]
        moves[:, here] = staleness(rope, source, behind)
        shift = 1 + number * length - source.start
        for whole, (key, value) in zip(cached, source.layers, strict=True):
            whole[0][:, :, here] = rope.rotate(key, shift).transpose(1, 2)
            whole[1][:, :, here] = value.transpose(1, 2)
    return cached, moves


def _encoded(model: Any, front: Tensor, text: Tensor) -> Encoded:
    """A text's KV behind other tokens, [batch, tokens, heads, size]."""
    start = front.shape[1]
    layers = reference.forward(model, torch.cat([front, text], 1)).key_values
    return Encoded(
        start, [(k.transpose(1, 2)[:, start:], v.transpose(1, 2)[:, start:]) for k, v in layers]
    )
