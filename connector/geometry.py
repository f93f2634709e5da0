"""What an engine's KV looks like, by vLLM's configuration, or why the store cannot keep it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform

from connector import groups
from connector.compat import BlockState, TransferResults
from connector.groups import KvGroup
from connector.states import SPEC as STATE_SPEC
from connector.states import StateForm, form_of
from connector.states import refusal as refusal_of_states
from prefixstore.codec import NONE
from prefixstore.codec.rounded import rounded_layout
from prefixstore.layout import Layout

Group = list[tuple[KvGroup, Any]]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the engine's KV looks like, or why the store cannot keep it."""

    layout: Layout | None
    block_tokens: int
    refused: str = ""
    groups: tuple[KvGroup, ...] = ()
    states: StateForm | None = None


def geometry_of(
    vllm_config: Any, kv_cache_config: Any, chunk_tokens: int, codec: str = NONE
) -> Geometry:
    """Derive the layout of chunks from vLLM's configuration.

    A chunk is at least ``chunk_tokens``, in whole blocks of every group; for a model with states it
    is one block. Raises ConfigError for a ``codec`` that cannot round this KV.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_layers = int(model.hf_text_config.num_hidden_layers)
    found, of_states = groups_of(vllm_config, kv_cache_config, num_layers)
    if not found:
        return Geometry(None, 0, "the model has no KV cache")
    block = math.lcm(*(group.block_tokens for group, _ in found + of_states))
    # vLLM keeps a prompt's last state where its last whole block ends: that must be a chunk's end.
    tokens = block if of_states else -(-chunk_tokens // block) * block
    kept, spec = tuple(group for group, _ in found), found[0][1]
    planes = groups.num_planes(spec)
    refused = _refusal(vllm_config, planes) or groups.refusal(found, tokens)
    if of_states:
        num_layers = _num_layers(kv_cache_config, found)  # others have no KV
        refused = refused or _refusal_of_states(vllm_config, [spec for _, spec in of_states])
    if groups.are_all_or_nothing(kept, kv_cache_config.kv_cache_groups) and not TransferResults:
        refused = refused or "several groups of KV caches: this vLLM takes no load that failed"
    if refused:
        return Geometry(None, block, refused)
    layout = Layout(
        num_layers=num_layers,
        num_planes=planes,
        num_heads=1 if planes == 1 else max(int(model.get_total_num_kv_heads()), 1),
        chunk_tokens=tokens,
        head_bytes=int(spec.head_size) * _element_bytes(spec.dtype),
    )
    layout = rounded_layout(codec, layout, str(spec.dtype).removeprefix("torch."))
    per_rank = max(1, layout.num_heads // int(parallel.tensor_parallel_size))
    if int(spec.num_kv_heads) != per_rank:
        why = f"{spec.num_kv_heads} KV heads a rank where {per_rank} were expected"
        return Geometry(None, block, why)
    states = None
    if of_states:
        ranks = int(parallel.tensor_parallel_size)
        num_states = _num_layers(kv_cache_config, of_states)
        states = form_of(of_states, num_states, ranks, tokens, _backend())
    return Geometry(layout, block, "", kept, states)


def _num_layers(kv_cache_config: Any, found: Group) -> int:
    """Layers in these groups."""
    return sum(len(kv_cache_config.kv_cache_groups[group.index].layer_names) for group, _ in found)


def groups_of(vllm_config: Any, kv_cache_config: Any, num_layers: int) -> tuple[Group, Group]:
    """vLLM's groups of layers with attention, and those of layers with states, with their specs."""
    own = own_layers(vllm_config, num_layers)
    found = groups.groups_of(kv_cache_config.kv_cache_groups, own)
    has_state = [type(spec).__name__ == STATE_SPEC for _, spec in found]
    return (
        [one for one, state in zip(found, has_state, strict=True) if not state],
        [one for one, state in zip(found, has_state, strict=True) if state],
    )


def _backend() -> str:
    return f"{current_platform.device_type}, vLLM {vllm.__version__}"


def own_layers(vllm_config: Any, num_layers: int) -> int | None:
    """What `groups.without_drafts` needs: ``num_layers`` where there is a draft model."""
    return None if getattr(vllm_config, "speculative_config", None) is None else num_layers


def _refusal_of_states(vllm_config: Any, specs: Sequence[Any]) -> str:
    if BlockState is None:
        return "states (Mamba, linear attention): this vLLM does not say where they are"
    return refusal_of_states(vllm_config, specs)


def _refusal(vllm_config: Any, planes: int) -> str:
    """Why this engine's KV cannot be kept, whatever its layers are; "" when it can."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if getattr(vllm_config.model_config, "is_diffusion", False):
        return "attention that is not causal: KV of a prefix depends on what follows"
    chunked = getattr(vllm_config.scheduler_config, "enable_chunked_prefill", True)
    if planes == 1 and not chunked and not cache.enable_prefix_caching:
        # So vLLM does on CPUs without AMX, where such a prefill ignores the prefix without a word.
        return (
            "MLA with chunked prefill and prefix caching both off: its backend may not be able to "
            "compute a prompt behind a prefix"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} above 1"
    if getattr(cache, "calculate_kv_scales", False):
        return "calculate_kv_scales: KV scales that depend on the first request"
    if getattr(cache, "kv_cache_dtype_skip_layers", None):
        return "kv_cache_dtype_skip_layers: layers with different KV dtypes"
    return ""


def _element_bytes(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()
