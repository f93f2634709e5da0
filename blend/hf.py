"""Blending for Hugging Face models: use and study it without an engine.

    source = blend.encode(model, document_ids, preamble_ids)     # once a document
    cache, report = blend.prefill(model, prompt_ids, [Placed(source, start=40)], budget=0.15)
    model.generate(prompt_ids, past_key_values=cache)

The model's own decoder layers run; only their attention is replaced while a prefill is under way,
by one that reads and writes the K and V of the whole prompt. Batch size 1. Architectures whose
layers have the call convention of Llama and attend to everything before them: see `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from blend.errors import BlendError, UnsupportedModelError
from blend.plan import Plan, Segment
from blend.recompute import Blend, Observer, Report
from blend.rope import Rope
from blend.select import DEFAULT, selector_named
from blend.staleness import Encoded, staleness

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_ATTENTION = "prefixstore-blend"
_OBSERVED_ROWS = 64  # rows whose attention is looked at in one go


@dataclass(frozen=True, slots=True)
class Source:
    """A text with its KV, as encoded on its own behind a preamble.

    ``keys[layer]`` and ``values[layer]`` are [tokens, kv heads, head size], K rotated for positions
    from ``start``. ``staleness`` is float32 [tokens] or None, see `measure_staleness`.
    """

    ids: Tensor
    start: int
    keys: list[Tensor]
    values: list[Tensor]
    staleness: Tensor | None = None

    @property
    def encoded(self) -> Encoded:
        """Its KV alone."""
        return Encoded(self.start, list(zip(self.keys, self.values, strict=True)))


@dataclass(frozen=True, slots=True)
class Placed:
    """Where in a prompt a source is reused. ``exact``: it stands behind what it stood behind."""

    source: Source
    start: int
    exact: bool = False


class HuggingFaceHost:
    """`blend.recompute.Host` for one prompt of ``ids`` (int64 [tokens])."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        config = check_model(model)
        self._model, self._ids = model, ids.to(model.device)
        self.num_layers = int(config.num_hidden_layers)
        self.device = model.device
        heads = int(config.num_key_value_heads)
        size = int(
            getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
        )
        shape = (self.num_layers, heads, len(ids), size)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self._positions = torch.zeros(0, dtype=torch.int64)
        self._observe: Observer | None = None

    def place(self, rope: Rope, placed: Placed) -> None:
        """Write a source's K, moved to its new position, and V."""
        source, at = placed.source, placed.start
        for index in range(self.num_layers):
            moved = rope.rotate(source.keys[index].to(self.device), at - source.start)
            self.keys[index, :, at : at + len(source.ids)] = moved.transpose(0, 1)
            value = source.values[index].to(self.device)
            self.values[index, :, at : at + len(source.ids)] = value.transpose(0, 1)

    # ------------------------------------------------------------------ Host
    def embed(self, positions: Tensor) -> Tensor:
        """See `Host`: [1, r, hidden]."""
        embedded: Tensor = self._model.get_input_embeddings()(self._ids[positions][None])
        return embedded

    def layer(
        self, index: int, positions: Tensor, state: Tensor, observe: Observer | None = None
    ) -> Tensor:
        """See `Host`."""
        self._positions, self._observe = positions.to(self.device), observe
        place = self._positions[None]
        decoder = self._model.get_decoder()
        with _attention_of(self._model, self):
            result = decoder.layers[index](
                state,
                attention_mask=None,
                position_ids=place,
                position_embeddings=decoder.rotary_emb(state, position_ids=place),
                blend_host=self,
            )
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    def take(self, state: Tensor, rows: Tensor) -> Tensor:
        """See `Host`."""
        return state[:, rows]

    def join(self, states: list[Tensor]) -> Tensor:
        """See `Host`."""
        return torch.cat(states, 1)

    def key_values(self, index: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Host`."""
        both = self.keys[index][:, positions], self.values[index][:, positions]
        return both[0].transpose(0, 1), both[1].transpose(0, 1)

    def reduce(self, values: Tensor) -> Tensor:
        """See `Host`: one rank."""
        return values

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attention of the current rows ([1, heads, r, size]); returns [1, r, heads, size]."""
        rows = self._positions
        self.keys[index][:, rows] = key[0]
        self.values[index][:, rows] = value[0]
        end = int(rows[-1]) + 1
        visible = torch.arange(end, device=self.device)[None] <= rows[:, None]
        keys, values = self.keys[index, None, :, :end], self.values[index, None, :, :end]
        if self._observe is not None:
            self._observe(self._mass(query[0], keys[0], visible, scaling))
        out = scaled_dot_product_attention(
            query, keys, values, attn_mask=visible[None, None], scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)

    def _mass(self, query: Tensor, keys: Tensor, visible: Tensor, scaling: float) -> Tensor:
        """float32 [tokens]: softmax weights on each position, summed over rows and heads."""
        total = torch.zeros(len(self._ids), device=self.device)
        grouped = keys.float().repeat_interleave(len(query) // len(keys), 0)
        for part in torch.arange(query.shape[1], device=self.device).split(_OBSERVED_ROWS):
            logits = query[:, part].float() @ grouped.transpose(1, 2) * scaling
            weights = logits.masked_fill(~visible[part], float("-inf")).softmax(-1)
            total[: keys.shape[1]] += weights.sum((0, 1))
        return total


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, blend_host: HuggingFaceHost, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    return blend_host.attend(module.layer_idx, query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)


@contextmanager
def _attention_of(model: PreTrainedModel, host: HuggingFaceHost) -> Iterator[None]:
    """The model's layers attend through the host meanwhile."""
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def check_model(model: PreTrainedModel) -> Any:
    """Its text config. Raises UnsupportedModelError for what cannot be blended."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} are not supported",
            f"supported are {', '.join(ARCHITECTURES)}",
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window
    ):
        raise UnsupportedModelError("models with sliding-window attention are not supported")
    return config


@torch.inference_mode()
def encode(model: PreTrainedModel, ids: Tensor, preamble: Tensor | None = None) -> Source:
    """Compute a text's KV on its own, behind a preamble (BOS, a system prompt).

    ``ids`` and ``preamble`` are int64 [tokens]. Texts are tokenised apart and joined as ids.
    """
    front = ids.new_zeros(0) if preamble is None else preamble
    host = HuggingFaceHost(model, torch.cat([front, ids]))
    Blend(host, Plan(len(front) + len(ids), ()), selector_named("none"), 0.0).run()
    keys = [layer[:, len(front) :].transpose(0, 1).clone() for layer in host.keys]
    values = [layer[:, len(front) :].transpose(0, 1).clone() for layer in host.values]
    return Source(ids, len(front), keys, values)


def measure_staleness(
    model: PreTrainedModel,
    source: Source,
    contexts: Sequence[Tensor],
    preamble: Tensor | None = None,
) -> Source:
    """The source, with how far the KV of each token moves when other texts stand before it.

    Each of ``contexts`` (int64 [tokens]; two are enough) is one or, better, several other
    texts of the same collection. See `blend.staleness`. Raises BlendError when there is none.
    """
    if not contexts:
        raise BlendError("no context to measure staleness behind", "give at least one other text")
    behind = []
    for context in contexts:
        front = context if preamble is None else torch.cat([preamble, context])
        behind.append(encode(model, source.ids, front).encoded)
    rope = Rope.from_config(check_model(model).to_dict())
    return replace(source, staleness=staleness(rope, source.encoded, behind))


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    ids: Tensor,
    segments: Sequence[Placed],
    selector: str = DEFAULT,
    budget: float = 0.15,
    *,
    span: int = 1,
    seed: int = 0,
    true_deviation: Tensor | None = None,
) -> tuple[DynamicCache, Report]:
    """KV of all but the last token of a prompt, reusing segments, ready for ``generate()``.

    ``ids`` is int64 [tokens] or [1, tokens]. At most ``budget`` of the work of recomputing all
    reused tokens is spent on them. Raises BlendError.
    """
    flat = ids.flatten()
    if len(flat) < 2:
        raise BlendError(f"a prompt of {len(flat)} tokens", "give at least two")
    parts = []
    for placed in segments:
        source, at = placed.source, placed.start
        if not torch.equal(flat[at : at + len(source.ids)].cpu(), source.ids.cpu()):
            raise BlendError(
                f"the prompt has other tokens at {at} than the segment placed there",
                "tokenise texts apart and join them as ids",
            )
        parts.append(Segment(at, len(source.ids), source.start, placed.exact, source.staleness))
    host = HuggingFaceHost(model, flat[:-1])
    plan = Plan(len(flat) - 1, tuple(parts))
    rope = Rope.from_config(check_model(model).to_dict())
    for placed in segments:
        host.place(rope, placed)
    report = Blend(
        host, plan, selector_named(selector), budget,
        span=span, seed=seed, true_deviation=true_deviation,
    ).run()  # fmt: skip
    cache = DynamicCache()
    for index in range(host.num_layers):
        cache.update(host.keys[index][None], host.values[index][None], index)
    return cache, report
