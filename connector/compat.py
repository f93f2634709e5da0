"""All that is known of vLLM's internals, probed by feature, never by version.

Works with 0.26 (the oldest supported) to 0.32. The rest of the connector sees plain values.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from connector.options import EngineOptions
from connector.page_probe import PageLayoutError
from connector.pages import PageMap
from connector.rank import Rank
from prefixstore.identity import ModelIdentity, lora_fingerprint, model_folder
from prefixstore.keys import MultimodalItem
from prefixstore.layout import Layout, Roi
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")
_CONTENT_HASH = re.compile(r"(?:^|:)[0-9a-f]{64,}$")
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


# ---------------------------------------------------------------------- the model
@dataclass(frozen=True, slots=True)
class Geometry:
    """What the engine's KV looks like, or why the store cannot keep it."""

    layout: Layout | None
    block_tokens: int
    refused: str = ""


def geometry(vllm_config: Any, kv_cache_config: Any, chunk_tokens: int) -> Geometry:
    """Derive the layout of chunks from vLLM's configuration.

    A chunk is at least ``chunk_tokens``, rounded up to whole blocks of the engine.
    """
    block = int(vllm_config.cache_config.block_size)
    groups = kv_cache_config.kv_cache_groups
    refused = _refusal(vllm_config, groups)
    if refused:
        return Geometry(None, block, refused)
    spec = groups[0].kv_cache_spec
    block = int(spec.block_size)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    tokens = -(-chunk_tokens // block) * block
    layout = Layout(
        num_layers=int(model.hf_text_config.num_hidden_layers),
        num_planes=2,
        num_heads=max(int(model.get_total_num_kv_heads()), 1),
        chunk_tokens=tokens,
        head_bytes=int(spec.head_size) * _element_bytes(spec.dtype),
    )
    per_rank = max(1, layout.num_heads // int(parallel.tensor_parallel_size))
    if int(spec.num_kv_heads) != per_rank:
        why = f"{spec.num_kv_heads} KV heads a rank where {per_rank} were expected"
        return Geometry(None, block, why)
    return Geometry(layout, block)


def _refusal(vllm_config: Any, groups: Sequence[Any]) -> str:
    """Why this engine's KV cannot be kept; "" when it can."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if len(groups) != 1:
        return f"the model has {len(groups)} groups of KV caches (hybrid attention)"
    spec = groups[0].kv_cache_spec
    diffusion = getattr(vllm_config.model_config, "is_diffusion", False)
    if getattr(spec, "non_causal", False) or diffusion:
        return "attention that is not causal: KV of a prefix depends on what follows"
    if type(spec).__name__ != "FullAttentionSpec":
        return f"KV caches of kind {type(spec).__name__}"
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


def identities(vllm_config: Any, chunk_tokens: int) -> Callable[[Any], ModelIdentity]:
    """A function from a request's LoRA (or None) to the identity of its KV.

    Raises ConfigError when the model cannot be identified.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    folder, revision = _model_folder(vllm_config)
    overrides = dict(model.hf_overrides) if isinstance(model.hf_overrides, dict) else {}
    if callable(model.hf_overrides) or getattr(model, "hf_config_path", None):
        overrides = model.hf_config.to_dict()
    settings = _settings_that_change_kv(model)
    if settings:
        overrides["engine_settings"] = settings
    kv_dtype = str(cache.cache_dtype)
    known: dict[tuple[int, str], ModelIdentity] = {}

    def identify(lora_request: Any) -> ModelIdentity:
        path = "" if lora_request is None else str(lora_request.lora_path)
        name = (0 if lora_request is None else int(lora_request.lora_int_id), path)
        if name not in known or getattr(lora_request, "load_inplace", False):
            known[name] = ModelIdentity.from_folder(
                folder,
                model_dtype=str(model.dtype).removeprefix("torch."),
                kv_dtype=kv_dtype,
                chunk_tokens=chunk_tokens,
                quantization=model.quantization,
                kv_scales="checkpoint" if kv_dtype.startswith("fp8") else "",
                lora=lora_fingerprint(path) if path else None,
                config_overrides=overrides,
                revision=revision,
            )
        return known[name]

    identify(None)
    return identify


def _settings_that_change_kv(model: Any) -> dict[str, str]:
    """Settings of the engine, not of the model's folder, with which it computes another KV."""
    names = (
        "quantization_config", "model_class_overrides", "video_pruning_rate",
        "video_pruning_method", "mm_processor_kwargs",
    )  # fmt: skip
    settings = {name: str(getattr(model, name, None) or "") for name in names}
    implementation = str(getattr(model, "model_impl", "auto")).rpartition(".")[2].lower()
    settings["model_impl"] = "" if implementation in ("auto", "vllm") else implementation
    config = model.hf_text_config.to_dict()
    rope = f"{config.get('rope_scaling')} {config.get('rope_parameters')}"
    if "longrope" in rope or "dynamic" in rope:
        settings["max_model_len"] = str(model.max_model_len)
    return {name: value for name, value in settings.items() if value}


def _model_folder(vllm_config: Any) -> tuple[Path, str | None]:
    """The local folder of the model, and the commit that stands for its weights if there is one."""
    model = vllm_config.model_config
    if str(getattr(vllm_config.load_config, "load_format", "auto")) == "dummy":
        seed = hashlib.sha1(f"dummy weights, seed {model.seed}".encode()).hexdigest()
        return Path(model.model), seed
    return model_folder(model.model, model.revision), None


def explain_new_namespace(store: Store, identity: ModelIdentity) -> None:
    """Say once in the log what makes this model's KV different from what the store holds."""
    records = store.namespaces()
    if not records or any(r.identity.namespace == identity.namespace for r in records):
        return
    nearest = min((r.identity for r in records), key=lambda i: len(identity.difference(i)))
    logger.info(
        "prefixstore: %s holds no KV of this model yet. The nearest it holds differs in %s",
        store.folder, identity.explain_mismatch(nearest),
    )  # fmt: skip


# ---------------------------------------------------------------------- requests
def heed_role(options: EngineOptions, transfer: Any) -> EngineOptions:
    """An engine that is not a consumer loads nothing (vLLM holds no freed block back for it), one
    that is not a producer saves nothing."""
    return replace(
        options,
        load=options.load if transfer.is_kv_consumer else "never",
        save=options.save and transfer.is_kv_producer,
    )


def steps_ahead(vllm_config: Any) -> int:
    """How many steps vLLM may have begun before it hears of the first: 2 with async scheduling."""
    return 2 if getattr(vllm_config.scheduler_config, "async_scheduling", False) else 1


def has_stable_tokens(request: Any) -> bool:
    """Whether keys can be made for a request that will stay true.

    Not for prompts given as embeddings; not for streaming sessions, whose tokens vLLM may take
    back; not for images and the like that are named by a counter or by the client instead of a hash
    of their content (as vLLM does without its multimodal cache, or with ``multi_modal_uuids``).
    """
    return (
        request.prompt_token_ids is not None
        and request.prompt_embeds is None
        and not getattr(request, "resumable", False)
        and all(_CONTENT_HASH.search(f.identifier) for f in request.mm_features or ())
    )


def token_ids(request: Any, start: int) -> list[int]:
    """Token ids from ``start`` on, prompt and output."""
    return list(request.all_token_ids[start:])


def multimodal_items(request: Any) -> list[MultimodalItem]:
    """Images and the like: where their tokens stand, and the hash vLLM has given them."""
    return [
        MultimodalItem(
            feature.mm_position.offset,
            feature.mm_position.length,
            hashlib.blake2b(
                f"{feature.modality}\0{feature.identifier}".encode(), digest_size=16
            ).digest(),
        )
        for feature in request.mm_features or ()
    ]


def scheduled_requests(
    output: Any,
) -> Iterator[tuple[str, list[int] | None, int, bool]]:
    """(id, block ids, computed tokens, whether the ids replace those known) for each request."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, list(new.block_ids[0]), int(new.num_computed_tokens), True
    cached = output.scheduled_cached_reqs
    for req_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        first = None if blocks is None else list(blocks[0])
        yield req_id, first, int(computed), req_id in cached.resumed_req_ids


# ---------------------------------------------------------------------- workers
def rank_of(
    vllm_config: Any, kv_cache_config: Any, layout: Layout, kv_caches: dict[str, torch.Tensor]
) -> Rank:
    """Map this rank's KV caches. Of ranks with copies of the same heads (more ranks than heads)
    one saves. Raises PageLayoutError when the backend packs what we cannot."""
    names = sorted(kv_caches, key=layer_number)
    numbers = [layer_number(name) for name in names]
    if numbers != list(range(numbers[0], numbers[0] + len(names))):
        raise PageLayoutError(f"layers {numbers} are not one contiguous range")
    if numbers[-1] >= layout.num_layers:
        raise PageLayoutError("there are KV caches of layers beyond the model's (a draft model's)")
    layers = vllm_config.compilation_config.static_forward_context
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    shared: dict[Any, PageMap] = {}
    pages = []
    for name in names:
        kv = kv_caches[name]
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
    return Rank(pages, layout, roi, writer_group(vllm_config), rank % copies == 0)


def layer_number(name: str) -> int:
    """Which layer of the model an attention layer of this name belongs to."""
    match = _LAYER_NUMBER.search(f".{name}.")
    if match is None:
        raise PageLayoutError(f"cannot tell which layer {name!r} is")
    return int(match[1])


def writer_group(vllm_config: Any) -> int:
    """A number all ranks of this engine share and no other engine has."""
    name = str(vllm_config.kv_transfer_config.engine_id).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
