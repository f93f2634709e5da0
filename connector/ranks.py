"""One rank's KV caches as vLLM registers them: which layers they are, where their pages lie."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from blend.rounding import RoundingError
from connector import groups
from connector.geometry import Group, groups_of, own_layers
from connector.page_probe import PageLayoutError
from connector.pages import PageMap
from connector.rank import Rank
from connector.states import StateForm, StatePages
from prefixstore.layout import Layout, Roi


def rank_of(
    vllm_config: Any,
    kv_cache_config: Any,
    layout: Layout,
    states: StateForm | None,
    kv_caches: dict[str, Any],
    codec: str,
) -> Rank:
    """Map this rank's KV caches. Of ranks with copies of the same heads (more ranks than heads)
    one saves. ``codec``: see `Rank`. Raises PageLayoutError for pages that are packed otherwise,
    and for a device that cannot round.
    """
    found, of_states = groups_of(vllm_config, kv_cache_config, layout.num_layers)
    names, numbers = _layers(vllm_config, kv_cache_config, layout, of_states, kv_caches)
    layers = vllm_config.compilation_config.static_forward_context
    spec = found[0][1]
    shared: dict[Any, PageMap] = {}
    pages = []
    for name in names:
        kv = kv_caches[name]
        kv = kv.unsqueeze(1) if kv.dim() == 3 else kv  # latents, before vLLM 0.32
        ratio = max(1, kv.shape[0] // int(kv_cache_config.num_blocks))
        page_map = PageMap.probe(
            layers[name], kv, int(spec.num_kv_heads), int(spec.head_size),
            vllm_config.model_config.dtype, ratio, shared,
        )  # fmt: skip
        pages.append(page_map.bind(kv))
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    rank, size = int(group.rank_in_group), int(group.world_size)
    if size <= layout.num_heads:
        heads, copies = layout.num_heads // size, 1
        first = rank * heads
    else:
        heads, copies = 1, size // layout.num_heads
        first = rank // copies
    roi = Roi(numbers[0], numbers[-1] + 1, first, first + heads)
    kept = tuple(group for group, _ in found)
    members = [set(kv_cache_config.kv_cache_groups[group.index].layer_names) for group in kept]
    group_of = [i for name in names for i, known in enumerate(members) if name in known]
    if len(group_of) != len(names):
        raise PageLayoutError(f"of layers {names} not each is in one of vLLM's groups")
    states_of = _state_pages(kv_cache_config, states, kv_caches, rank)
    try:
        return Rank(
            pages, layout, roi, writer_group(vllm_config), rank % copies == 0, None, kept, group_of,
            states_of, rank, codec,
        )  # fmt: skip
    except RoundingError as error:
        raise PageLayoutError(f"{error}; leave out the codec") from error


def _layers(
    vllm_config: Any,
    kv_cache_config: Any,
    layout: Layout,
    of_states: Group,
    kv_caches: dict[str, Any],
) -> tuple[list[str], list[int]]:
    """The layers with KV in order, and their numbers in a chunk: those of the model, but counted
    without gaps where layers between them have states instead."""
    mine = set(kv_caches)
    for group, _ in of_states:
        mine -= set(kv_cache_config.kv_cache_groups[group.index].layer_names)
    own = own_layers(vllm_config, layout.num_layers)
    names = sorted(groups.without_drafts(mine, own), key=layer_number)
    numbers = list(range(len(names))) if of_states else [layer_number(name) for name in names]
    if not names or numbers != list(range(numbers[0], numbers[0] + len(names))):
        raise PageLayoutError(f"layers {numbers} are not one contiguous range")
    if numbers[-1] >= layout.num_layers:
        raise PageLayoutError(f"layers {numbers} of a model of {layout.num_layers} layers")
    return names, numbers


def _state_pages(
    kv_cache_config: Any, form: StateForm | None, kv_caches: dict[str, Any], rank: int
) -> StatePages | None:
    """This rank's states, layer by layer."""
    if form is None:
        return None
    layers, members = [], []
    for place, group in enumerate(form.groups):
        for name in kv_cache_config.kv_cache_groups[group.index].layer_names:
            layers.append((layer_number(name), name))
            members.append(place)
    order = sorted(range(len(layers)), key=layers.__getitem__)
    kept = [kv_caches[layers[i][1]] for i in order]
    tensors = [[one] if isinstance(one, torch.Tensor) else list(one) for one in kept]
    try:
        return StatePages(form, tensors, [members[i] for i in order], rank)
    except ValueError as error:
        raise PageLayoutError(f"{error}; leave out the codec") from error


def layer_number(name: str) -> int:
    """Which layer of the model an attention layer of this name belongs to."""
    number = groups.layer_number(name)
    if number is None:
        raise PageLayoutError(f"cannot tell which layer {name!r} is")
    return number


def writer_group(vllm_config: Any) -> int:
    """A number all ranks of this engine share and no other engine has."""
    name = str(vllm_config.kv_transfer_config.engine_id).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


def share_of_device(vllm_config: Any) -> float | None:
    """The part of a device's memory that vLLM was given; None if it was told bytes instead."""
    cache = vllm_config.cache_config
    if getattr(cache, "kv_cache_memory_bytes", None) is not None:
        return None
    return float(cache.gpu_memory_utilization)
