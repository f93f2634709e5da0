"""Which rotation of K a Hugging Face config.json describes, and which models have just that one.

A model that is not listed is refused: a wrong guess would not fail, it would give wrong K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from blend.errors import UnsupportedModelError

Style = Literal["neox", "gptj"]


class _Model(NamedTuple):
    """What transformers' class of a model says and config.json may leave out."""

    style: Style = "neox"
    theta: float = 10_000.0
    partial: float | None = None  # None: the model rotates the whole head, whatever the config says
    head_dim: int | None = None  # None: hidden_size // num_attention_heads


# Read in the source of transformers 5.19: every layer applies plain RoPE, after the norm of K where
# there is one. Left out on purpose, among others: layers that differ (cohere2, exaone4, gemma3,
# olmo3, smollm3), a norm of K after RoPE (hunyuan, llama4), MLA (deepseek), M-RoPE (the VL models),
# another type than "default" when the config names none (apertus, gpt_oss).
MODELS: dict[str, _Model] = {
    # Halves: component i turns with component i + rotary_dim / 2.
    **dict.fromkeys(["arcee", "granite", "llama", "mistral", "olmo", "olmo2", "olmoe"], _Model()),
    **dict.fromkeys(["qwen2", "qwen2_moe", "qwen3_moe", "starcoder2"], _Model()),
    "gemma": _Model(head_dim=256),
    "gemma2": _Model(head_dim=256),
    "glm4_moe": _Model(partial=0.5),
    "gpt_neox": _Model(partial=0.25),
    "mixtral": _Model(theta=1_000_000.0),
    "nemotron": _Model(partial=0.5),
    "phi": _Model(partial=0.5),
    "phi3": _Model(partial=1.0),
    "qwen3": _Model(head_dim=128),
    "seed_oss": _Model(head_dim=128),
    "stablelm": _Model(partial=0.25),
    # Interleaved: component 2i turns with component 2i + 1.
    "cohere": _Model("gptj", theta=500_000.0),
    "ernie4_5": _Model("gptj", theta=500_000.0, head_dim=128),
    "ernie4_5_moe": _Model("gptj", theta=500_000.0),
    "glm": _Model("gptj", partial=0.5, head_dim=128),
    "glm4": _Model("gptj", partial=0.5, head_dim=128),
    "gptj": _Model("gptj"),  # its config has rotary_dim
    "helium": _Model("gptj", theta=100_000.0, head_dim=128),
}
HINT = "run this model without blending; prefix reuse needs no rotation and still works"
# Settings by which an otherwise plain model stops being one.
_NOT_PLAIN = ("dual_chunk_attention_config", "layer_rope_theta", "no_rope_layers")
_NOT_PLAIN_ROPE = ("mrope_section", "use_fope")


def read_config(config: Mapping[str, Any]) -> tuple[Tensor, Style, float]:
    """(inverse frequencies as float32 [rotary_dim / 2], style, attention factor) of ``config``.

    :meth:`blend.rope.Rope.from_config` says what is read and refused.
    """
    name = config.get("model_type")
    model = MODELS.get(str(name))
    if model is None:
        raise UnsupportedModelError(
            f"model type {name!r} is not known to rotate K by plain RoPE in every layer", HINT
        )
    rope = _rope_dict(config)
    dim = _rotary_dim(config, rope, model)
    theta = rope.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    theta = model.theta if theta is None else _number({"rope_theta": theta}, "rope_theta", "RoPE")
    inv_freq, attention_factor = _frequencies(config, rope, theta, dim)
    return inv_freq, model.style, attention_factor


def _rope_dict(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The RoPE settings of either form; refuses those that are not one plain RoPE."""
    rope: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    layers = [key for key, value in rope.items() if isinstance(value, Mapping)]
    found = [key for key in _NOT_PLAIN if config.get(key)]
    found += [key for key in _NOT_PLAIN_ROPE if rope.get(key)]
    if layers or found:
        what = f"RoPE differs by layer type {layers}" if layers else f"the config sets {found[0]}"
        raise UnsupportedModelError(f"{what}, so K is not moved by one rotation", HINT)
    return rope


def _rotary_dim(config: Mapping[str, Any], rope: Mapping[str, Any], model: _Model) -> int:
    if config["model_type"] == "gptj":
        dim = _number(config, "rotary_dim", "model type 'gptj'")
    else:
        head = config.get("head_dim") or model.head_dim
        if not head:
            heads = _number(config, "num_attention_heads", "a config without head_dim")
            head = _number(config, "hidden_size", "a config without head_dim") // heads
        part = config.get("partial_rotary_factor", config.get("rotary_pct", model.partial))
        part = rope.get("partial_rotary_factor", part)
        if model.partial is None and part not in (None, 1):
            raise UnsupportedModelError(
                f"partial_rotary_factor is {part}, but models of type {config['model_type']!r} "
                "rotate the whole head",
                HINT,
            )
        dim = int(head * (1.0 if part is None else part))
    if dim < 2 or dim % 2:
        raise UnsupportedModelError(f"rotary dimension {dim} is not even and positive", HINT)
    return int(dim)


def _number(values: Mapping[str, Any], key: str, needed_by: str) -> Any:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UnsupportedModelError(
            f"{needed_by} needs {key}, got {value!r}", "check the model's config.json"
        )
    return value


def _frequencies(
    config: Mapping[str, Any], rope: Mapping[str, Any], theta: float, dim: int
) -> tuple[Tensor, float]:
    """(w as float32 [dim / 2], m): the steps and roundings of transformers' functions."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedModelError(
            f"RoPE type {kind!r} is not supported; default, linear, llama3 and yarn are", HINT
        )
    powers: Tensor = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    inv_freq = 1.0 / powers
    if kind == "default":
        return inv_freq, 1.0
    needs = f"RoPE type {kind!r}"
    if kind == "linear":
        return inv_freq / _number(rope, "factor", needs), 1.0
    original = "original_max_position_embeddings"
    old = config.get(original) or rope.get(original) or config.get("max_position_embeddings")
    old = _number({original: old}, original, needs)
    if kind == "llama3":
        return _llama3(rope, inv_freq, old), 1.0
    factor = rope.get("factor")
    if factor is None:  # as DeepSeek-V3 and its kin write it
        factor = _number(config, "max_position_embeddings", needs + " without factor") / old
    return _yarn(rope, powers, theta, factor, old)


def _llama3(rope: Mapping[str, Any], inv_freq: Tensor, old: float) -> Tensor:
    needs = "RoPE type 'llama3'"
    factor, low = _number(rope, "factor", needs), _number(rope, "low_freq_factor", needs)
    high = _number(rope, "high_freq_factor", needs)
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > old / low, inv_freq / factor, inv_freq)
    smooth = (old / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    medium = (wavelength >= old / high) & (wavelength <= old / low)
    return torch.where(medium, between, scaled)


def _yarn(
    rope: Mapping[str, Any], powers: Tensor, theta: float, factor: float, old: float
) -> tuple[Tensor, float]:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def turns_at(turns: float) -> float:
        """The component that turns so often within the original length."""
        return dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    dim = 2 * len(powers)
    attention = rope.get("attention_factor")
    if attention is None:
        some, every = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = mscale(some) / mscale(every) if some and every else mscale(1.0)
    low, high = turns_at(rope.get("beta_fast") or 32), turns_at(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    inv_freq = (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept
    return inv_freq, float(attention)
