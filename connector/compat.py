"""All that is known of vLLM's internals, probed by feature, never by version.

Works with 0.26 (the oldest supported) to 0.32. The rest of the connector sees plain values.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1 import base as connector_base
from vllm.platforms import current_platform
from vllm.v1.core.sched import output as scheduler_output_module

from connector import groups
from connector.groups import KvGroup
from connector.options import EngineOptions
from connector.states import SPEC as STATE_SPEC
from connector.states import StateForm, form_of
from connector.states import refusal as refusal_of_states
from prefixstore.identity import ModelIdentity, lora_fingerprint, model_folder
from prefixstore.interface import StoreLike
from prefixstore.keys import MultimodalItem
from prefixstore.layout import Layout
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")
# Absent in vLLM 0.26, which has no way to say that a load failed but by block.
TransferResults: Any = getattr(connector_base, "KVConnectorTransferResults", None)
BlockState: Any = getattr(scheduler_output_module, "KVConnectorBlockState", None)
Group = list[tuple[KvGroup, Any]]
_CONTENT_HASH = re.compile(r"(?:^|:)[0-9a-f]{64,}$")


# ---------------------------------------------------------------------- the model
@dataclass(frozen=True, slots=True)
class Geometry:
    """What the engine's KV looks like, or why the store cannot keep it."""

    layout: Layout | None
    block_tokens: int
    refused: str = ""
    groups: tuple[KvGroup, ...] = ()
    states: StateForm | None = None


def geometry(vllm_config: Any, kv_cache_config: Any, chunk_tokens: int) -> Geometry:
    """Derive the layout of chunks from vLLM's configuration.

    A chunk is at least ``chunk_tokens``, rounded up to whole blocks of every group; for a model
    with states it is one block.
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


def computed_by(vllm_config: Any) -> str:
    """What the speed of an engine hangs on beside the model: which devices, and how many."""
    try:
        device = str(current_platform.get_device_name())
    except (NotImplementedError, RuntimeError):  # not each platform can tell
        device = str(current_platform.device_type)
    cores = f" of {os.cpu_count()} cores" if device == "cpu" else ""
    sizes = vllm_config.parallel_config
    return f"{device}{cores}, TP {sizes.tensor_parallel_size}, PP {sizes.pipeline_parallel_size}"


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


def explain_new_namespace(store: StoreLike, identity: ModelIdentity) -> None:
    """Say once in the log what makes this model's KV different from what a folder holds."""
    if not isinstance(store, Store):
        return  # a server says it: `prefixstore connect`
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


def traceparent(request: Any) -> str:
    """The trace a request belongs to; "" for none."""
    return str((getattr(request, "trace_headers", None) or {}).get("traceparent", ""))


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
) -> Iterator[tuple[str, list[list[int]] | None, int, bool]]:
    """(id, block ids by vLLM's group, computed tokens, whether the ids replace those known) for
    each request."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, [list(ids) for ids in new.block_ids], int(new.num_computed_tokens), True
    cached = output.scheduled_cached_reqs
    for req_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        tables = None if blocks is None else [list(ids) for ids in blocks]
        yield req_id, tables, int(computed), req_id in cached.resumed_req_ids


def places_of_states(output: Any) -> dict[str, dict[int, dict[int, int]]]:
    """Where this step leaves states that may be kept: {request: {tokens: {group: block}}}."""
    state = getattr(output, "kv_connector_block_state", None)
    found: dict[str, dict[int, dict[int, int]]] = {}
    for req_id, offers in (state.boundary_state_offloads if state is not None else {}).items():
        for group, block, num_tokens in offers:
            found.setdefault(req_id, {}).setdefault(int(num_tokens), {})[int(group)] = int(block)
    return found
