"""All that is known of vLLM's internals, probed by feature, never by version.

Works with 0.26 (the oldest supported) to 0.32. The rest of the connector sees plain values.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as connector_base
from vllm.platforms import current_platform
from vllm.v1.core.sched import output as scheduler_output_module

from connector.options import EngineOptions
from prefixstore.identity import ModelIdentity, lora_fingerprint, model_folder
from prefixstore.interface import StoreLike
from prefixstore.keys import MultimodalItem
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")
# Absent in vLLM 0.26, which has no way to say that a load failed but by block.
TransferResults: Any = getattr(connector_base, "KVConnectorTransferResults", None)
BlockState: Any = getattr(scheduler_output_module, "KVConnectorBlockState", None)
_CONTENT_HASH = re.compile(r"(?:^|:)[0-9a-f]{64,}$")


# ---------------------------------------------------------------------- the model
def computed_by(vllm_config: Any) -> str:
    """What the speed of an engine hangs on beside the model: which devices, and how many."""
    try:
        device = str(current_platform.get_device_name())
    except (NotImplementedError, RuntimeError):  # not each platform can tell
        device = str(current_platform.device_type)
    cores = f" of {os.cpu_count()} cores" if device == "cpu" else ""
    sizes = vllm_config.parallel_config
    return f"{device}{cores}, TP {sizes.tensor_parallel_size}, PP {sizes.pipeline_parallel_size}"


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
