"""What a page of SGLang's host pool is: its bytes, whose KV it is, and what cannot be kept.

What must hold: two ranks whose pages may differ in any byte have different identities. Everything
is read from SGLang's own objects, never from the name a model is served under. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from prefixstore.errors import ConfigError
from prefixstore.identity import ModelIdentity, model_folder
from prefixstore.interface import StoreLike, open_store
from prefixstore.layout import Layout

# Order of a plane's bytes in each layout of the host pool; equal ones can share.
_ORDERS = {
    "layer_first": "layer,token,head",
    "page_first_direct": "layer,token,head",
    "page_first": "token,layer,head",
    "page_head": "head,token,layer",
}
# Where versions of SGLang keep their arguments.
_ARGUMENTS = (
    ("sglang.srt.runtime_context", "get_server_args"),
    ("sglang.srt.server_args", "get_global_server_args"),
)
_KV_SETTINGS = (
    "dtype", "torchao_config", "model_impl", "context_length", "json_model_override_args",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """Entries of ``prefixstore`` in the extra config."""

    url: str  # dir:/path, http://host:port, https://... or unix:/path
    token_file: str | None = None
    ca_file: str | None = None
    deadline_s: float = 5.0  # of a call to a server
    salt: str = ""  # engines with other salts share nothing with this one

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any] | None) -> Options:
        """Read them. Raises ConfigError naming the entry."""
        given = (extra_config or {}).get("prefixstore")
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not isinstance(given.get("url"), str):
            raise ConfigError(
                "the extra config has no prefixstore.url",
                '"prefixstore": {"url": "http://10.0.0.7:7575"}, or dir:/path',
            )
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"prefixstore has unknown entries {unknown}", f"known: {known}")
        return cls(**given)

    def open(self) -> StoreLike:
        """The store. A server need not be there yet. Raises StoreError, OSError."""
        if self.url.startswith("dir:"):
            return open_store(self.url)
        token = Path(self.token_file).read_text().strip() if self.token_file else ""
        return open_store(self.url, token=token, deadline_s=self.deadline_s, ca_file=self.ca_file)


@dataclass(frozen=True, slots=True)
class Page:
    """What a page of the host pool is."""

    layout: Layout  # planes stand for layers, since a region is a range of layers
    contiguous: bool  # each plane of a page is one run of the host pool

    @classmethod
    def of(cls, pool: Any, config: Any) -> Page:
        """Raises ConfigError for a pool that holds more, or other things, than pages of KV."""
        kind = "MLATokenToKVPoolHost" if config.is_mla_model else "MHATokenToKVPoolHost"
        if type(pool).__name__ != kind or pool.layout not in _ORDERS:
            raise ConfigError(
                f"a host pool {type(pool).__name__} with layout {pool.layout!r}",
                f"only {kind} with {', '.join(_ORDERS)} can be kept",
            )
        if pool.layer_num != pool.end_layer - pool.start_layer:
            raise ConfigError(
                f"{pool.layer_num} layers in the host pool, not those "
                f"{pool.start_layer} to {pool.end_layer} of the model",
                "a draft model's KV cannot be kept",
            )
        planes = 1 if config.is_mla_model else 2
        flat = pool.get_dummy_flat_data_page()
        bytes_a_token, rest = divmod(flat.numel() * flat.element_size(), planes * pool.page_size)
        layout = Layout(planes, 1, 1, int(pool.page_size), bytes_a_token)
        contiguous = pool.layout != "layer_first"
        if contiguous:
            _, sizes = pool.get_page_buffer_meta(torch.arange(pool.page_size))
            rest += list(sizes) != [layout.piece_bytes] * planes
        if rest:
            raise ConfigError("pages of K and V that differ in size", "they cannot be kept")
        return cls(layout, contiguous)


def identity_of(pool: Any, config: Any) -> ModelIdentity:
    """Of this rank's KV. Raises ConfigError for what cannot be told apart."""
    args = _arguments()
    refusals = {
        "LoRA: page hashes do not name the adapter": args.enable_lora or args.lora_paths,
        "random weights": args.load_format == "dummy",
        "KV scales from a file": args.quantization_param_path,
    }
    for why, holds in refusals.items():
        if holds:
            raise ConfigError(why, "serve without this backend")
    kv_dtype = str(pool.device_pool.dtype).removeprefix("torch.")
    quantized = kv_dtype.startswith("float8")
    if not quantized and kv_dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"KV in {kv_dtype}", "its scales cannot be kept; serve without this")
    settings = {"engine": "sglang", "order": _ORDERS[pool.layout]}
    settings["layers"] = f"{pool.start_layer}:{pool.end_layer}"
    if not config.is_mla_model:
        settings["heads"] = f"{config.tp_rank}/{config.tp_size}"
    for name in _KV_SETTINGS:
        settings[name] = str(getattr(args, name, None) or "")
    identity = ModelIdentity.from_folder(
        model_folder(args.model_path, args.revision),
        model_dtype=str(args.dtype) if quantized else kv_dtype,
        kv_dtype=kv_dtype,
        chunk_tokens=int(pool.page_size),
        quantization=args.quantization,
        kv_scales="checkpoint" if quantized else "",
        config_overrides={"engine_settings": settings},
    )
    if config.is_mla_model:
        found, expected = (1, int(pool.kv_cache_dim)), (1, identity.head_size)
    else:
        found = int(pool.head_num), int(pool.head_dim)
        expected = max(1, identity.num_kv_heads // config.tp_size), identity.head_size
    if found != expected:
        raise ConfigError(
            f"a pool of (heads, head size) {found} where the model's folder says {expected}",
            "serve without this backend",
        )
    return identity


def _arguments() -> Any:
    """The arguments SGLang was started with: its name of a model is not the model."""
    for module, name in _ARGUMENTS:
        try:
            return getattr(import_module(module), name)()
        except (ImportError, AttributeError, ValueError):
            continue
    raise ConfigError("cannot tell SGLang's arguments", "this version of SGLang is not supported")
