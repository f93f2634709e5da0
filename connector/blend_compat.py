"""What blending needs of vLLM's internals, found by looking for it, and why it may be refused."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from functools import partial
from types import FrameType
from typing import Any

from blend.errors import BlendError
from blend.rope import Rope
from connector import self_test, self_test_isolation
from connector.blend_claims import BlendClaims
from connector.blend_engine import ARCHITECTURES, Engine, make_engine
from connector.blend_options import BlendOptions, step_rows
from connector.options import EngineOptions
from connector.rank import Rank
from connector.ranks import layer_number
from prefixstore.identity import ModelIdentity
from prefixstore.layout import Layout


def refusal(vllm_config: Any, kv_cache_config: Any) -> str:
    """Why this engine cannot blend; "" when nothing speaks against it."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    sizes = {
        "pipeline parallelism": "pipeline_parallel_size",
        "data parallelism": "data_parallel_size",
        "context parallelism": "decode_context_parallel_size",
        "prefill context parallelism": "prefill_context_parallel_size",
    }
    for name, field in sizes.items():
        if getattr(parallel, field, 1) > 1:
            return f"it uses {name}"
    if vllm_config.lora_config is not None:
        return "it serves LoRA adapters"
    if getattr(vllm_config, "speculative_config", None) is not None:
        return "it decodes speculatively"
    if len(kv_cache_config.kv_cache_groups) != 1:
        return "its layers keep several kinds of KV"
    if str(cache.cache_dtype) not in ("auto", "float32", "float16", "bfloat16"):
        return f"its KV cache is {cache.cache_dtype}"
    if getattr(kv_cache_config.kv_cache_groups[0].kv_cache_spec, "sliding_window", None):
        return "its attention has a sliding window"
    architectures = vllm_config.model_config.hf_config.architectures or []
    if not any(name in ARCHITECTURES for name in architectures):
        return f"{', '.join(architectures)} is not one of {', '.join(ARCHITECTURES)}"
    try:
        Rope.from_config(vllm_config.model_config.hf_text_config.to_dict())
    except BlendError as error:
        return str(error)
    return ""


def find_model() -> Any:
    """The model, from the model runner that is registering its KV caches; None if it is not.

    vLLM gives a connector no handle on it. The runner is on the call stack at that moment.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner: Any = frame.f_locals.get("self")
        if hasattr(owner, "get_model") and hasattr(owner, "initialize_kv_cache"):
            return owner.get_model()
        frame = frame.f_back
    return None


def isolate(vllm_config: Any, request: Any, exact_tokens: int) -> None:
    """Give the blocks of a request behind its exact part private names in vLLM's prefix cache.

    Blended KV depends on more than the tokens before it: under the usual names other requests would
    get it as theirs. May be called again, for fewer exact tokens.
    """
    size = getattr(vllm_config.cache_config, "hash_block_size", None)
    size = size or vllm_config.cache_config.block_size
    hashes = request.block_hashes
    # The name of a later block follows from the last one here, so at least that is made private.
    first = min(exact_tokens // size, max(len(hashes) - 1, 0))
    salt = hashlib.sha256(f"prefixstore blend\0{request.request_id}".encode()).digest()
    for index in range(first, len(hashes)):
        hashes[index] = type(hashes[index])(hashlib.sha256(salt + bytes(hashes[index])).digest())
    if not hashes:  # the first block's name takes in the salt
        request.cache_salt = f"prefixstore blend {request.request_id}"


def isolation_fault(vllm_config: Any, kv_cache_config: Any) -> str:
    """Why blended KV cannot be kept from other requests; "" when `isolate` does it."""
    try:
        kept_apart = partial(isolate, vllm_config)
        self_test_isolation.check_isolation(kept_apart, vllm_config, kv_cache_config)
    except BlendError as error:
        return str(error)
    return ""


def claims_of(
    vllm_config: Any,
    kv_cache_config: Any,
    options: EngineOptions,
    layout: Layout,
    identity: ModelIdentity,
) -> BlendClaims:
    """Whether this engine blends, and splits. A mistake in the settings is a ConfigError."""
    most = _step_tokens(vllm_config)
    blend = BlendOptions.parse(options.blend, layout.num_layers, most)
    rows = step_rows(blend, most, splits=options.splits)
    num_ranks = int(vllm_config.parallel_config.tensor_parallel_size)
    claims = BlendClaims(blend, layout.num_layers, num_ranks, rows * options.splits)
    if blend is None and not rows:
        return claims
    refused = refusal(vllm_config, kv_cache_config)
    if refused:
        claims.refuse(refused)
    elif blend is not None:
        refused = isolation_fault(vllm_config, kv_cache_config)
        if not refused:
            claims.options, refused = blend.heed_verdict(
                options.blend, options.dir, identity, layout.num_layers
            )
        if refused:
            claims.refuse_blends(refused)
    return claims


def _step_tokens(vllm_config: Any) -> int:
    return int(vllm_config.scheduler_config.max_num_batched_tokens)


def engine_of(
    vllm_config: Any,
    kv_cache_config: Any,
    rank: Rank,
    kv_caches: Iterable[str],
    options: EngineOptions,
) -> tuple[Engine | None, str]:
    """What blends and splits need of this rank, or why there is none, "" if none is wanted or the
    scheduler's half says it. Call it while caches are registered, with the names of their layers.
    """
    names = list(kv_caches)
    most = _step_tokens(vllm_config)
    blend = BlendOptions.parse(options.blend, len(names), most)
    slice_rows = step_rows(blend, most, splits=options.splits)
    if not slice_rows or refusal(vllm_config, kv_cache_config):
        return None, ""
    model = find_model()
    if model is None:
        return None, "the model cannot be found from where vLLM registers its KV caches"
    if rank.pages[0].page_map.kernel_blocks_per_block != 1:
        return None, "the attention kernels use smaller blocks than the scheduler"
    try:
        names.sort(key=layer_number)
        engine = make_engine(
            vllm_config, kv_cache_config, model, names, rank.pages, slice_rows,
            rank.layout.chunk_tokens,
        )  # fmt: skip
        self_test.check_rank(engine, rank)
    except (BlendError, *self_test.OTHER_INTERNALS) as error:
        return None, str(error) or type(error).__name__
    return engine, ""
