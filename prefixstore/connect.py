"""What an engine of a model will ask of a store: its identity and layout, before it is started.

With vLLM the identity is the connector's own. Without it is read from the model's folder and the
few arguments that are understood, and the notes say what that leaves open. What must hold: a layout
is given only where the connector will have the same, since a namespace keeps its first one. Pure.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from prefixstore.codec import NONE
from prefixstore.codec.rounded import rounded_layout
from prefixstore.errors import ConfigError
from prefixstore.identity import ModelIdentity, model_folder
from prefixstore.layout import Layout

CHUNK_TOKENS = 64
_ELEMENT_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1,
}  # fmt: skip
_UNDERSTOOD = {"dtype", "kv_cache_dtype", "quantization", "revision", "block_size", "hf_overrides"}
# Of the folder's identity no part: they change where KV lies, or when, not what it is.
_HARMLESS = {
    "tensor_parallel_size", "pipeline_parallel_size", "max_model_len", "max_num_seqs",
    "gpu_memory_utilization", "max_num_batched_tokens", "enforce_eager", "seed", "port", "host",
    "enable_prefix_caching", "served_model_name", "trust_remote_code", "tokenizer",
}  # fmt: skip
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class ModelFacts:
    """A model as an engine will serve it. ``layout`` None: only the engine knows it."""

    name: str
    identity: ModelIdentity
    layout: Layout | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """For `connect --json`; sizes in bytes."""
        identity = self.identity
        return {
            "name": self.name,
            "architecture": identity.architecture,
            "model_dtype": identity.model_dtype,
            "kv_dtype": identity.kv_dtype,
            "codec": identity.codec,
            "chunk_tokens": identity.chunk_tokens,
            "chunk_bytes": self.layout.payload_bytes if self.layout else None,
        }

    def is_of(self, told: Mapping[str, Any]) -> bool:
        """Whether an identity that a server listed is this one."""
        return _parse(told) == self.identity

    def nearest(self, listed: Iterable[Mapping[str, Any]]) -> str:
        """In what the nearest of the identities differs; "" if there is none."""
        known = [_parse(told) for told in listed]
        if not known:
            return ""
        closest = min(known, key=lambda other: len(self.identity.difference(other)))
        return self.identity.explain_mismatch(closest)


def _parse(told: Mapping[str, Any]) -> ModelIdentity:
    return ModelIdentity.from_json(json.dumps(told))


def model_facts(
    model: str,
    engine: Mapping[str, Any],
    chunk_tokens: int | None,
    with_vllm: bool,
    codec: str = NONE,
) -> ModelFacts:
    """Facts of a model, a folder or a hub name, for engines with a codec. Raises ConfigError."""
    tokens = CHUNK_TOKENS if chunk_tokens is None else chunk_tokens
    if tokens < 1:
        raise ConfigError(f"--chunk-tokens {tokens}", "give a whole number above 0")
    notes: list[str] = []
    if with_vllm and importlib.util.find_spec("vllm") is not None:
        model_folder(model, engine.get("revision"))  # says more clearly what is not there
        identity = import_module("connector.warming").facts(model, engine, tokens).identity
    else:
        identity = _from_folder(model, engine, tokens, notes)
    identity = identity.with_codec(codec)
    layout = layout_of(identity)
    if layout is None:
        notes.append("only the engine knows the layout of this model's KV: no bytes were sent")
    return ModelFacts(model, identity, layout, notes)


def layout_of(identity: ModelIdentity) -> Layout | None:
    """The connector's layout for an identity; None for one that the engine decides. Raises
    ConfigError for a codec that does not fit it."""
    attention = json.loads(identity.attention)
    element = _ELEMENT_BYTES.get(identity.kv_dtype)
    layers = set(attention.get("layer_types") or ())
    if element is None or not layers <= _PLAIN_LAYERS:
        return None
    planes = 1 if attention.get("kv_lora_rank") else 2
    layout = Layout(
        identity.num_layers, planes, identity.num_kv_heads, identity.chunk_tokens,
        identity.head_size * element,
    )  # fmt: skip
    return rounded_layout(identity.codec, layout, identity.kv_dtype)


def _from_folder(
    model: str, engine: Mapping[str, Any], tokens: int, notes: list[str]
) -> ModelIdentity:
    notes.append("without vLLM the identity is that of the folder and --engine")
    if other := sorted(set(engine) - _UNDERSTOOD - _HARMLESS):
        notes.append(f"not looked at: {', '.join(other)}; an engine may differ in it")
    block = int(engine.get("block_size") or 1)
    kv_dtype = str(engine.get("kv_cache_dtype", "auto"))
    overrides = engine.get("hf_overrides") or {}
    if not isinstance(overrides, Mapping):
        raise ConfigError("hf_overrides is no object", "give what the engine is given")
    identity = ModelIdentity.from_folder(
        model_folder(model, engine.get("revision")),
        model_dtype=str(engine.get("dtype", "auto")),
        kv_dtype=kv_dtype,
        chunk_tokens=-(-tokens // block) * block,
        quantization=engine.get("quantization"),
        kv_scales="checkpoint" if kv_dtype.startswith("fp8") else "",
        config_overrides=dict(overrides),
    )
    if "dtype" not in engine and identity.model_dtype == "float32":
        notes.append(
            "vLLM serves a float32 model in another dtype: give --engine '{\"dtype\": ..}'"
        )
    return identity
