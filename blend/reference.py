"""Blending in plain PyTorch, slowly and obviously: what every fast path is compared with.

Whole matrices, an explicit mask, a batch of prompts of one shape, float32 softmax; the projections,
norms and MLPs are the Hugging Face model's own. Every token is computed at every layer; where it is
not *fresh*, its cached K and V are put in place of the new ones, so nobody sees the difference.
Shares with `blend.recompute` only the choice itself, `blend.select`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blend.select import CHECK_LAYER, Known, Needs, check_budget, selector_named

KeyValues = list[tuple[Tensor, Tensor]]  # a layer: K and V, [batch, kv heads, tokens, head size]


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward pass: ``logits`` [batch, tokens, vocabulary] and what each layer attended to.

    ``mass`` is float32 [batch, tokens, tokens]: softmax weights of each row on each position,
    summed over heads and layers.
    """

    logits: Tensor
    key_values: KeyValues
    mass: Tensor | None


@dataclass(frozen=True, slots=True)
class Reused:
    """What is reused in prompts ``ids`` [batch, tokens]; masks are bool [tokens].

    ``cached`` holds K and V at the prompt's positions; ``offsets`` int64 [tokens];
    ``staleness`` float32 [batch, tokens].
    """

    ids: Tensor
    cached: KeyValues
    candidates: Tensor
    fresh: Tensor
    offsets: Tensor
    staleness: Tensor


@dataclass(frozen=True, slots=True)
class Blended:
    """The outcome. ``chosen`` is bool [batch, tokens], ``charged`` the share that was paid."""

    trace: Trace
    chosen: Tensor
    charged: float


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


def forward(
    model: Any,
    ids: Tensor,
    visible: Tensor | None = None,
    cached: KeyValues | None = None,
    fresh: list[Tensor] | None = None,
    *,
    want_mass: bool = False,
    num_layers: int | None = None,
) -> Trace:
    """A forward pass over ``ids`` [batch, tokens].

    ``visible`` bool [tokens, tokens] says what a row attends to (default: all up to itself). With
    ``cached``, K and V of layer i come from it except at ``fresh[i]``, bool [batch, tokens].
    """
    decoder = model.get_decoder()
    batch, tokens = ids.shape
    if visible is None:
        visible = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()
    hidden = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(hidden, torch.arange(tokens, device=ids.device)[None])
    stored: KeyValues = []
    mass = torch.zeros(batch, tokens, tokens, device=ids.device) if want_mass else None
    for index, layer in enumerate(decoder.layers[:num_layers]):
        attention = layer.self_attn
        query, key, value = _project(attention, layer.input_layernorm(hidden))
        query, key = (
            _rotated(query, cos[:, None], sin[:, None]),
            _rotated(key, cos[:, None], sin[:, None]),
        )
        if cached is not None and fresh is not None:
            here = fresh[index][:, None, :, None]
            key = torch.where(here, key, cached[index][0])
            value = torch.where(here, value, cached[index][1])
        stored.append((key, value))
        groups = query.shape[1] // key.shape[1]
        logits = query.float() @ key.float().repeat_interleave(groups, 1).transpose(2, 3)
        logits = (logits * attention.scaling).masked_fill(~visible, float("-inf"))
        weights = logits.softmax(-1)
        if mass is not None:
            mass += weights.sum(1)
        mixed = weights @ value.float().repeat_interleave(groups, 1)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, -1).to(hidden.dtype)
        hidden = hidden + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return Trace(model.lm_head(decoder.norm(hidden)), stored, mass)


def _project(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V before rotation, [batch, heads, tokens, head size]; with Qwen3's norms."""
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    query, key = attention.q_proj(hidden).view(shape), attention.k_proj(hidden).view(shape)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    value = attention.v_proj(hidden).view(shape)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def change(old: KeyValues, new: KeyValues, layer: int, where: Tensor) -> Tensor:
    """float32 [batch, tokens]: squared change of K and of V, each relative to its mean size.

    The mean is over the tokens ``where`` (bool [tokens]) of each prompt.
    """
    total = torch.zeros(old[layer][0].shape[0], old[layer][0].shape[2], device=where.device)
    for before, after in zip(old[layer], new[layer], strict=True):
        size = (before.float() ** 2).sum((1, 3))[:, where].mean(1, keepdim=True)
        total += ((after.float() - before.float()) ** 2).sum((1, 3)) / size
    return total


@torch.inference_mode()
def blend(
    model: Any,
    reused: Reused,
    selector: str,
    budget: float,
    *,
    span: int = 1,
    seed: int = 0,
    free_choice: bool = False,
) -> Blended:
    """Blend a batch of prompts. Raises BlendError.

    With ``free_choice`` only recomputed tokens are charged, not what it took to choose them: what
    a method would reach if its scores fell from the sky, to be fair to it.
    """
    rule = selector_named(selector)
    layers = int(model.config.num_hidden_layers)
    if not free_choice:
        check_budget(rule, budget, layers)
    where = reused.candidates
    num_candidates, num_fresh = int(where.sum()), int(reused.fresh.sum())
    shape = reused.ids.shape
    every = (where | reused.fresh).expand(shape)
    only_fresh = reused.fresh.expand(shape)
    scores: Tensor | None = None
    first_layer = spent = 0
    if rule.needs is Needs.DEVIATION:
        trace = forward(
            model, reused.ids, None, reused.cached, [every] * layers, num_layers=CHECK_LAYER + 1
        )
        scores = change(reused.cached, trace.key_values, CHECK_LAYER, where)
        first_layer = CHECK_LAYER + 1
        spent = first_layer * num_candidates
    elif rule.needs is Needs.QUERY:
        trace = forward(
            model, reused.ids, None, reused.cached, [only_fresh] * layers, want_mass=True
        )
        assert trace.mass is not None
        scores = trace.mass[:, reused.fresh].sum(1)
        spent = layers * num_fresh
    elif rule.needs is Needs.TRUTH:
        full = forward(model, reused.ids, None, reused.cached, [every] * layers).key_values
        scores = sum(
            (change(reused.cached, full, layer, where) for layer in range(layers)),
            start=torch.zeros(shape, device=where.device),
        )
    if free_choice:
        count, spent = int(budget * num_candidates + 1e-9), 0
    else:
        left = budget * layers * num_candidates - spent
        count = max(0, int(left / (layers - first_layer) + 1e-9))
    chosen = torch.zeros(shape, dtype=torch.bool, device=reused.ids.device)
    positions = where.nonzero().flatten()
    for row in range(shape[0]):
        known = Known(
            positions, reused.offsets[positions], reused.staleness[row, positions], count,
            span, seed, None if scores is None else scores[row, positions],
        )  # fmt: skip
        chosen[row, positions] = rule.choose(known)
    kept = chosen | only_fresh
    sets = [every] * first_layer + [kept] * (layers - first_layer)
    trace = forward(model, reused.ids, None, reused.cached, sets)
    paid_layers = layers if free_choice else layers - first_layer
    spent += int(chosen.sum()) * paid_layers // shape[0]
    return Blended(trace, chosen, spent / max(1, layers * num_candidates))
