"""What a model's ``config.json`` says about its KV, in one form for all spellings.

Owns: the keys of Hugging Face configs and which of them count in which field of an identity. Must
hold: an entry is left out only if it is listed here as harmless; anything unknown counts, in
`ConfigFacts.forward`. Pure functions, so a crash leaves nothing behind.

``null`` and "absent" stay different except for RoPE scaling: absent means the model class's own
default, which need not be null (Mistral's sliding window is 4096).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixstore.fingerprint import IdentityError

Config = Mapping[str, Any]

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEAD_SIZE = ("head_dim", "kv_channels")
_QUANTIZATION = ("quantization_config", "compression_config")
_ROPE = (
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_type",
    "rotary_dim",
    "rotary_emb_base",
    "rotary_pct",
)
# RoPE kinds whose angles do not depend on max_position_embeddings. Of any other kind it counts.
_LENGTH_FREE_ROPE = {"default", "linear", "llama3", "mrope", "proportional"}
_ATTENTION = (
    "attention_bias",
    "attention_chunk_size",
    "kv_lora_rank",
    "layer_types",
    "max_window_layers",
    "no_rope_layers",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "qkv_bias",
    "sliding_window",
    "sliding_window_pattern",
    "use_qk_norm",
    "use_sliding_window",
    "v_head_dim",
)
_HARMLESS = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "hidden_dropout",
    "initializer_range",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "resid_pdrop",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    *_QUANTIZATION,
}
_DTYPE_ALIASES = {
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "fp32": "float32",
    "fp8": "fp8_e4m3",
}


@dataclass(frozen=True, slots=True)
class ConfigFacts:
    """The entries of a config that count, sorted by what they decide.

    ``head_size`` is in elements. ``dtype`` is "" when the config names none; ``quantization`` is
    canonical JSON, "" when there is none. ``forward`` holds all that is in no other field and
    not known to be harmless.
    """

    architecture: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    rope: dict[str, Any]
    attention: dict[str, Any]
    dtype: str
    quantization: str
    forward: dict[str, Any]

    @classmethod
    def read(cls, config: Config) -> ConfigFacts:
        """Read a config, of its nested text config if it has one. Raises IdentityError."""
        levels = list(_levels(config))
        text = levels[-1]
        num_kv_heads, head_size = _kv_shape(text)
        dtypes = (level.get(key) for level in reversed(levels) for key in ("dtype", "torch_dtype"))
        methods = [level[key] for level in levels for key in _QUANTIZATION if level.get(key)]
        return cls(
            architecture=_architecture(levels),
            num_layers=_positive_int(text, _LAYERS),
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            rope=_rope(text),
            attention={key: text[key] for key in _ATTENTION if key in text},
            dtype=next((str(dtype) for dtype in dtypes if dtype), ""),
            quantization=canonical_json(methods[0] if len(methods) == 1 else methods)
            if methods
            else "",
            forward=_forward(levels),
        )


def canonical_json(value: object) -> str:
    """JSON with sorted keys, no spaces, ASCII, and whole floats as integers (1e6 is 1000000).

    Raises IdentityError for what JSON cannot hold.
    """
    try:
        return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise IdentityError(f"a setting cannot be written as JSON: {error}") from error


def override_config(config: Config, overrides: Config) -> dict[str, Any]:
    """Replace entries of ``config``; objects named ``*_config`` are merged, not replaced."""
    result = dict(config)
    for key, value in overrides.items():
        old = result.get(key)
        if key.endswith("_config") and isinstance(old, Mapping) and isinstance(value, Mapping):
            value = override_config(old, value)
        result[key] = value
    return result


def normal_dtype(name: str, *, when_auto: str) -> str:
    """One spelling per dtype, such as "bfloat16". Raises IdentityError if "auto" is unresolved."""
    if name == "auto":
        if not when_auto:
            raise IdentityError(
                "config.json names no dtype; pass model_dtype, e.g. model_dtype='bfloat16'"
            )
        name = when_auto
    name = name.lower().removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def _plain(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _levels(config: Config) -> Iterator[Config]:
    """The config and the text configs nested in it, outermost first."""
    yield config
    for key in _TEXT_CONFIGS:
        if isinstance(config.get(key), Mapping):
            yield from _levels(config[key])
            return


def _architecture(levels: Sequence[Config]) -> str:
    for level in levels:
        names = level.get("architectures")
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return "+".join(names)
    model_type = levels[0].get("model_type")
    if isinstance(model_type, str) and model_type:
        return model_type
    raise IdentityError(
        "config.json names neither 'architectures' nor 'model_type'; pass one in config_overrides"
    )


def _find_int(config: Config, keys: Sequence[str]) -> int | None:
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise IdentityError(
                f"config.json has {key} = {value!r}; expected a whole number above 0, the same for "
                "all layers: pass it in config_overrides"
            )
        return value
    return None


def _positive_int(config: Config, keys: Sequence[str]) -> int:
    value = _find_int(config, keys)
    if value is None:
        raise IdentityError(
            f"config.json lacks {keys[0]} (or {', '.join(keys[1:])}); pass it in config_overrides, "
            "inside text_config if the model's text settings are nested"
        )
    return value


def _kv_shape(text: Config) -> tuple[int, int]:
    """(num_kv_heads, head_size) of the KV as engines keep it; for MLA, of the latent."""
    latent = _find_int(text, ["kv_lora_rank"])
    if latent is not None:
        return 1, latent + _positive_int(text, ["qk_rope_head_dim", "qk_rope_dim"])
    heads = _positive_int(text, _HEADS)
    kv_heads = _find_int(text, _KV_HEADS)
    if kv_heads is None:
        nested = text.get("attn_config")
        kv_heads = _find_int(nested, ["kv_n_heads"]) if isinstance(nested, Mapping) else None
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        kv_heads = 1
    head_size = _find_int(text, _HEAD_SIZE) or _positive_int(text, _HIDDEN) // heads
    return kv_heads or heads, head_size


def _rope(text: Config) -> dict[str, Any]:
    """All RoPE settings, the same for both spellings.

    Older configs have rope_theta and rope_scaling, newer ones rope_parameters with both inside.
    Where two places disagree both are kept: which of them wins is the model class's affair.
    """
    result: dict[str, Any] = {}
    for place in ("rope_parameters", "rope_scaling"):
        settings = text.get(place) or {}
        if not isinstance(settings, Mapping):
            raise IdentityError(f"config.json has {place} = {settings!r}; expected an object")
        for key, value in settings.items():
            _merge(result, "rope_type" if key == "type" else key, value, place)
    for key in _ROPE:
        if key in text and key not in ("rope_parameters", "rope_scaling"):
            _merge(result, key, text[key], "config")
    if not any(isinstance(value, Mapping) for value in result.values()):
        result.setdefault("rope_type", "default")
    if not set(_rope_kinds(result)) <= _LENGTH_FREE_ROPE and "max_position_embeddings" in text:
        result["max_position_embeddings"] = text["max_position_embeddings"]
    return result


def _merge(into: dict[str, Any], key: str, value: object, place: str) -> None:
    if into.setdefault(key, value) != value:
        into[f"{place}.{key}"] = value


def _rope_kinds(settings: Config) -> Iterator[str]:
    """Kinds named here or, for models with several, per layer type."""
    for key, value in settings.items():
        if key == "type" or key.endswith("rope_type"):
            yield str(value)
        elif isinstance(value, Mapping):
            yield from _rope_kinds(value)


def _forward(levels: Sequence[Config]) -> dict[str, Any]:
    *outer, text = levels
    counted = {*_HARMLESS, *_ROPE, *_ATTENTION, *_LAYERS, *_KV_HEADS}
    result: dict[str, Any] = {key: text[key] for key in text if key not in counted}
    for depth, level in enumerate(outer):
        inner = levels[depth + 1]
        result[f"outer{depth}"] = {
            key: value
            for key, value in level.items()
            if key not in _HARMLESS and value is not inner
        }
    return result
