"""Prefix KV of Hugging Face models, kept in a store: exact prefixes, no engine.

    with prefixstore.open("http://127.0.0.1:7575") as store:
        cache = load_prefix(store, model, ids)  # what of it is stored, perhaps nothing
        out = model.generate(ids, past_key_values=cache, return_dict_in_generate=True)
        save_prefix(store, model, out.sequences, out.past_key_values)

The identity is that of the model's folder with ``engine_settings``, so that this KV is never mixed
with vLLM's of the same weights, though its layout is the same: the two round differently, and a hit
must be what this engine would have computed. Attention implementations differ in the same way and
have namespaces of their own. What must hold: one prompt without padding, computed from position 0
by the weights of the folder; weights changed in memory are not seen. Keeps nothing itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prefixstore.errors import ConfigError
from prefixstore.identity import ModelIdentity, canonical_json, model_folder
from prefixstore.interface import NamespaceLike, StoreLike, open_store
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout
from prefixstore.putting import PutState

CHUNK_TOKENS = 64
_BATCH_BYTES = 64 << 20  # in host memory at once
_PLANES = 2
# Of other kinds of RoPE K depends on the length of the prompt.
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}


def load_prefix(
    store: StoreLike | str,
    model: PreTrainedModel,
    ids: Tensor | Sequence[int],
    *,
    salt: bytes = b"",
    chunk_tokens: int = CHUNK_TOKENS,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> DynamicCache:
    """The KV of the longest stored prefix of a prompt, without its last token at least.

    ``ids``: int [tokens] or [1, tokens]. ``store``: a store, or the address of one to open
    (``options``: those of `prefixstore.open`). ``folder`` of the model, if it was not loaded from
    there. The cache is on the model's device and is the caller's: `generate` appends to it. The
    tokens behind it are the caller's to compute. Raises StoreError; ConfigError for a model whose
    KV cannot be kept.
    """
    tokens = _tokens(ids)
    facts = _Facts.of(model, chunk_tokens, folder)
    cache = DynamicCache(config=model.config)
    with _opened(store, options) as opened:
        namespace = opened.namespace(facts.identity, facts.layout)
        refs = namespace.chain(tokens, salt=salt).refs()
        refs = refs[: namespace.match(refs).num_chunks]
        planes, found = facts.read(namespace, refs, model.device)
    length = min(found * chunk_tokens, len(tokens) - 1)
    if length > 0:
        for layer in range(facts.layout.num_layers):
            keys, values = (plane[layer, None, :, :length].contiguous() for plane in planes)
            cache.update(keys, values, layer)
    return cache


def save_prefix(
    store: StoreLike | str,
    model: PreTrainedModel,
    ids: Tensor | Sequence[int],
    cache: DynamicCache,
    *,
    salt: bytes = b"",
    chunk_tokens: int = CHUNK_TOKENS,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> int:
    """Store the whole chunks of a prompt from the cache that holds its KV; what is there is left.

    Returns how many leading tokens of the prompt are stored now. Arguments and errors are those of
    `load_prefix`; ``cache`` may hold fewer tokens than ``ids``, or more.
    """
    tokens = _tokens(ids)
    facts = _Facts.of(model, chunk_tokens, folder)
    facts.check(cache)
    tokens = tokens[: int(cache.get_seq_length())]
    with _opened(store, options) as opened:
        namespace = opened.namespace(facts.identity, facts.layout)
        refs = namespace.chain(tokens, salt=salt).refs()
        done = namespace.match(refs).num_chunks
        while done < len(refs):
            part = refs[done : done + facts.batch]
            payloads = facts.payloads(cache, done, len(part))
            states = namespace.put(part, [memoryview(one.numpy()) for one in payloads])
            stored = [state in (PutState.STORED, PutState.EXISTS) for state in states]
            done += stored.index(False) if False in stored else len(stored)
            if not all(stored):
                break  # no room, or somebody else is storing it
    return done * chunk_tokens


@dataclass(frozen=True)
class _Facts:
    """A model's KV: whose it is, and the shape of its chunks."""

    identity: ModelIdentity
    layout: Layout
    dtype: torch.dtype

    @classmethod
    def of(
        cls, model: PreTrainedModel, chunk_tokens: int, folder: str | os.PathLike[str] | None
    ) -> _Facts:
        _check_model(model)
        config = model.config
        settings = {"engine": "transformers", "attention": str(config._attn_implementation)}
        # The config as it is now: arguments of from_pretrained() may have changed the folder's.
        told = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        quantized = told.pop("quantization_config", None)
        if quantized is not None:
            settings["quantization"] = canonical_json({k: str(v) for k, v in quantized.items()})
        name, commit = config._name_or_path, getattr(config, "_commit_hash", None)
        if folder is None and not name:
            raise ConfigError("this model was not loaded from a folder", "save it, give its folder")
        identity = ModelIdentity.from_folder(
            model_folder(name, commit) if folder is None else folder,
            model_dtype=str(model.dtype),
            chunk_tokens=chunk_tokens,
            config_overrides={**told, "engine_settings": settings},
        )
        dtype = model.dtype
        layout = Layout(
            identity.num_layers, _PLANES, identity.num_kv_heads, chunk_tokens,
            identity.head_size * dtype.itemsize,
        )  # fmt: skip
        return cls(identity, layout, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a chunk: [layer][k|v][kv_head][token][dim]."""
        layout = self.layout
        dim = self.identity.head_size
        return layout.num_layers, _PLANES, layout.num_heads, layout.chunk_tokens, dim

    @property
    def batch(self) -> int:
        """Chunks that are moved at once."""
        return max(1, _BATCH_BYTES // self.layout.payload_bytes)

    def check(self, cache: DynamicCache) -> None:
        """Raise ConfigError unless the cache is of this model, and of one prompt."""
        layers, layout = list(getattr(cache, "layers", ())), self.layout
        if len(layers) != layout.num_layers or not all(type(one) is DynamicLayer for one in layers):
            raise ConfigError(
                f"a cache of {len(layers)} layers of {type(cache).__name__}",
                f"give a DynamicCache of {layout.num_layers} layers that keep every token",
            )
        length = int(cache.get_seq_length())
        expected = (1, layout.num_heads, length, self.identity.head_size)
        for one in layers if length else ():
            for plane in (one.keys, one.values):
                if plane is None or tuple(plane.shape) != expected or plane.dtype != self.dtype:
                    found = None if plane is None else (tuple(plane.shape), plane.dtype)
                    raise ConfigError(
                        f"a cache with KV of {found}", f"expected {expected}, {self.dtype}"
                    )

    def payloads(self, cache: DynamicCache, start: int, count: int) -> Tensor:
        """Chunks from a cache: uint8 [count, payload bytes]."""
        layers, _, heads, size, dim = self.shape
        chunks = torch.empty((count, *self.shape), dtype=self.dtype)
        span = slice(start * size, (start + count) * size)
        for layer in range(layers):
            found: Any = cache.layers[layer]
            for plane, kv in enumerate((found.keys, found.values)):
                cut = kv[0, :, span].reshape(heads, count, size, dim)
                chunks[:, layer, plane] = cut.transpose(0, 1).to("cpu")
        return chunks.view(count, -1).view(torch.uint8)

    def read(
        self, namespace: NamespaceLike, refs: Sequence[ChunkRef], device: torch.device
    ) -> tuple[tuple[Tensor, Tensor], int]:
        """K and V, each [layers, kv heads, tokens, head size], and how many leading chunks of
        them are good."""
        layers, _, heads, size, dim = self.shape
        keys = torch.empty((layers, heads, len(refs) * size, dim), dtype=self.dtype, device=device)
        planes, found = (keys, torch.empty_like(keys)), 0
        while found < len(refs):
            part = refs[found : found + self.batch]
            chunks = torch.empty((len(part), *self.shape), dtype=self.dtype)
            raw = chunks.view(len(part), -1).view(torch.uint8).numpy()
            tiers = namespace.get(part, [memoryview(row) for row in raw])
            good = tiers.index(0) if 0 in tiers else len(tiers)
            span = slice(found * size, (found + good) * size)
            for plane, whole in enumerate(planes):
                cut = chunks[:good, :, plane].permute(1, 2, 0, 3, 4)
                whole[:, :, span] = cut.reshape(layers, heads, good * size, dim).to(device)
            found += good
            if good < len(part):
                break  # evicted meanwhile, or damaged
        return planes, found


def _check_model(model: PreTrainedModel) -> None:
    """Raise ConfigError for a model whose KV of a prefix is not its own, or not to be named."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(rope.get("rope_type", "default"))}
    kinds |= {str(one["rope_type"]) for one in rope.values() if isinstance(one, dict)}
    kept = DynamicCache(config=model.config).layers
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    for refused, why in (
        (model.config.is_encoder_decoder, "it is an encoder with a decoder"),
        (getattr(config, "kv_lora_rank", None), "it has latent attention (MLA)"),
        (
            any(type(layer) is not DynamicLayer for layer in kept),
            "some layers do not keep every token (sliding windows, linear attention)",
        ),
        (not kinds <= _FIXED_ROPE, f"its RoPE ({', '.join(kinds)}) depends on the prompt's length"),
        (
            hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False),
            "it has adapters (PEFT), which its folder does not tell: merge them and save it",
        ),
        (len(devices) > 1, "it is spread over several devices"),
    ):
        if refused:
            raise ConfigError(f"the KV of this model cannot be kept: {why}", "do without the store")


def _tokens(ids: Tensor | Sequence[int]) -> list[int]:
    array = torch.as_tensor(ids)
    if array.dim() == 2 and array.shape[0] == 1:
        array = array[0]
    if array.dim() != 1 or array.is_floating_point():
        raise ConfigError(
            f"token ids of shape {tuple(array.shape)}, {array.dtype}",
            "give those of one prompt: [tokens] or [1, tokens]",
        )
    return list(array.tolist())


@contextmanager
def _opened(store: StoreLike | str, options: dict[str, Any]) -> Iterator[StoreLike]:
    """The store; one that is opened here is closed here."""
    if not isinstance(store, str):
        if options:
            raise ConfigError(f"{', '.join(options)} for a store that is open", "leave it out")
        yield store
        return
    with open_store(store, **options) as opened:
        yield opened
