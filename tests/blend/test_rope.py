"""Rotation of K against transformers' own rotary code, and against complex numbers in float64.

Independent truths: for every model type, the rotary class and apply function of its transformers
module; where their float32 angles are too coarse (far positions), numpy's complex multiplication.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blend import BlendError, Rope, UnsupportedModelError
from blend.rope_config import MODELS

transformers = pytest.importorskip("transformers")

TOKENS, HEADS = 24, 3
SMALL = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 151_000}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-no-truncate": {**YARN, "truncate": False},
    "yarn-betas": {**YARN, "beta_fast": 8, "beta_slow": 2},
    "yarn-factor": {**YARN, "attention_factor": 0.75},
    "yarn-short": {**YARN, "original_max_position_embeddings": 6},
    "yarn-long": {**YARN, "original_max_position_embeddings": 10_000_000, "beta_fast": 1e5},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns of token ids and lengths that do not matter here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def truth(config: Any, keys: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
    """(rotated ``keys`` [tokens, heads, head_size], rotary module) by transformers alone."""
    kind = config.model_type
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    if kind == "gptj":
        table = module.create_sinusoidal_positions(2048, config.rotary_dim)[positions]
        sin, cos = table.chunk(2, dim=-1)
        turned = module.apply_rotary_pos_emb(
            keys[None, ..., : config.rotary_dim], sin[None], cos[None]
        )
        return torch.cat((turned[0], keys[..., config.rotary_dim :]), -1), None
    name = next(n for n in sorted(vars(module)) if n.endswith("RotaryEmbedding"))
    rotary = getattr(module, name)(config)
    cos, sin = rotary(keys[None].float(), positions[None])
    dim = cos.shape[-1]
    turned = keys[None, ..., :dim].transpose(1, 2)
    turned = module.apply_rotary_pos_emb(turned, turned, cos, sin)[1].transpose(1, 2)[0]
    return torch.cat((turned, keys[..., dim:]), -1), rotary


def exact(rope: Rope, keys: Tensor, delta: np.ndarray | int) -> np.ndarray:
    """Rotation of ``keys`` by ``delta * inv_freq`` in complex float64."""
    values, half = keys.double().numpy().copy(), rope.rotary_dim // 2
    first, second = (
        (slice(0, half), slice(half, 2 * half))
        if rope.style == "neox"
        else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    angle = np.reshape(np.asarray(delta, np.float64), (-1, 1, 1)) * rope.inv_freq.numpy()
    z = (values[..., first] + 1j * values[..., second]) * np.exp(1j * angle)
    values[..., first], values[..., second] = z.real, z.imag
    return values


def some_keys(head_size: int = 64, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, HEADS, head_size, generator=generator) * 2 - 1


def make_config(model_type: str, **values: Any) -> Any:
    return transformers.CONFIG_MAPPING[model_type](**values)


def plain(style: str = "neox", rotary_dim: int = 64, theta: float = 10_000.0) -> Rope:
    powers = theta ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    return Rope(1.0 / powers, "gptj" if style == "gptj" else "neox")


def assert_moves(rope: Rope, config: Any, head_size: int) -> None:
    """K of transformers at one place, rotated, is K of transformers at the other place."""
    fresh = some_keys(head_size)
    old = torch.arange(TOKENS)
    for new in (old + 13, old.flip(0), torch.full_like(old, 7)):
        at_old, _ = truth(config, fresh, old)
        at_new, _ = truth(config, fresh, new)
        assert not torch.allclose(at_old, at_new, atol=1e-2)
        torch.testing.assert_close(rope.rotate(at_old, new - old), at_new, rtol=0, atol=1e-5)
    at_new, _ = truth(config, fresh, old + 13)
    at_old, _ = truth(config, fresh, old)
    torch.testing.assert_close(rope.rotate(at_old, 13), at_new, rtol=0, atol=1e-5)
    torch.testing.assert_close(rope.rotate(at_new, -13), at_old, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_every_listed_model_is_rotated_as_transformers_does(model_type: str) -> None:
    """Also from the bare config: defaults are those of the class in transformers."""
    bare: dict[str, Any] = {
        "model_type": model_type,
        **SMALL,
        **({"rotary_dim": 32} if "gptj" in model_type else {}),
    }
    config = make_config(**bare)
    head_size = getattr(config, "head_dim", None) or 64
    for given in (bare, config.to_dict()):
        rope = Rope.from_config(given)
        _, rotary = truth(config, some_keys(head_size), torch.arange(TOKENS))
        if rotary is not None:  # GPT-J has a table instead
            assert torch.equal(rope.inv_freq, rotary.inv_freq.double())
        assert_moves(rope, config, head_size)


@pytest.mark.parametrize("model_type", ["llama", "glm4", "glm4_moe"])
@pytest.mark.parametrize("scaling", sorted(SCALINGS))
def test_every_type_in_both_forms(model_type: str, scaling: str) -> None:
    settings = SCALINGS[scaling]
    base: dict[str, Any] = {
        "model_type": model_type,
        **SMALL,
        "head_dim": 64,
        "max_position_embeddings": 1024,
    }
    config = make_config(**base, rope_parameters={**settings, "rope_theta": 500.0})
    old_form = {k: v for k, v in settings.items() if k != "rope_type"}
    forms: list[dict[str, Any]] = [
        {**base, "rope_parameters": {**settings, "rope_theta": 500.0}},
        {**base, "rope_theta": 500.0, "rope_scaling": {**old_form, "type": settings["rope_type"]}},
        {**base, "rope_theta": 500.0, "rope_scaling": settings},
        config.to_dict(),
    ]
    _, rotary = truth(config, some_keys(), torch.arange(TOKENS))
    for form in forms:
        rope = Rope.from_config(form)
        assert torch.equal(rope.inv_freq, rotary.inv_freq.double())
        assert rope.attention_factor == rotary.attention_scaling
        assert rope.rotary_dim == (64 if model_type == "llama" else 32)
    assert_moves(rope, config, 64)


def test_older_names_of_gpt_neox() -> None:
    bare: dict[str, Any] = {
        "model_type": "gpt_neox",
        **SMALL,
        "rotary_pct": 0.5,
        "rotary_emb_base": 500.0,
    }
    config, rope = make_config(**bare), Rope.from_config(bare)
    assert rope.rotary_dim == 32
    _, rotary = truth(config, some_keys(), torch.arange(TOKENS))
    assert torch.equal(rope.inv_freq, rotary.inv_freq.double())
    assert_moves(rope, config, 64)


def test_config_without_scaling_or_length_fields() -> None:
    """Null settings mean none; the original length falls back to the top level, then the length."""
    base = {"model_type": "qwen2", **SMALL, "rope_theta": 1e6, "rope_scaling": None}
    assert torch.equal(
        Rope.from_config(base).inv_freq, Rope.from_config({**base, "head_dim": 64}).inv_freq
    )
    yarn = {"rope_type": "yarn", "factor": 4.0}
    want = Rope.from_config({**base, "rope_scaling": YARN}).inv_freq
    for length in ("max_position_embeddings", "original_max_position_embeddings"):
        got = Rope.from_config({**base, "rope_scaling": yarn, length: 256}).inv_freq
        assert torch.equal(got, want)
    by_ratio = {"rope_scaling": {**YARN, "factor": None}, "max_position_embeddings": 1024}
    assert torch.equal(Rope.from_config({**base, **by_ratio}).inv_freq, want)


@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize("rotary_dim", [64, 24, 2])
def test_far_moves_are_exact(style: str, rotary_dim: int) -> None:
    rope, keys = plain(style, rotary_dim), some_keys()
    rng = np.random.default_rng(1)
    deltas = rng.integers(-1_000_000, 1_000_001, TOKENS)
    deltas[:4] = (0, 1_000_000, -1_000_000, -1)
    for dtype in (torch.int64, torch.int32):
        moved = rope.rotate(keys, torch.from_numpy(deltas).to(dtype)).numpy()
        np.testing.assert_allclose(moved, exact(rope, keys, deltas), rtol=0, atol=2e-6)
    for delta in (1_000_000, -999_999, 1):
        moved = rope.rotate(keys, delta).numpy()
        np.testing.assert_allclose(moved, exact(rope, keys, delta), rtol=0, atol=2e-6)


def test_cos_sin_is_exact_to_a_millionth() -> None:
    rope = plain()
    deltas = torch.arange(-1_000_000, 1_000_001, 999)
    cos, sin = rope.cos_sin(deltas)
    angle = deltas.double().numpy()[:, None] * rope.inv_freq.numpy()
    assert cos.shape == sin.shape == angle.shape
    assert cos.dtype == sin.dtype == torch.float32
    assert np.abs(cos.numpy() - np.cos(angle)).max() < 1e-6
    assert np.abs(sin.numpy() - np.sin(angle)).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("style", ["neox", "gptj"])
def test_one_rounding_to_the_dtype(dtype: torch.dtype, style: str) -> None:
    """The rotation adds half a unit in the last place of the result and nothing else."""
    rope, keys = plain(style, 48), some_keys().to(dtype)
    deltas = np.arange(TOKENS) * 977 - 9000
    moved = rope.rotate(keys, torch.from_numpy(deltas))
    want = exact(rope, keys, deltas)
    assert moved.dtype == dtype
    error = np.abs(moved.double().numpy() - want)
    assert (error <= np.abs(want) * torch.finfo(dtype).eps / 2 + 1e-6).all()


def test_bfloat16_move_is_as_near_as_rotating_at_the_new_place() -> None:
    """Two roundings, of K at the old place and of the result, instead of one."""
    rope, fresh = plain(), some_keys()
    old, new = np.arange(TOKENS) + 5000, np.arange(TOKENS) + 100
    stored = torch.from_numpy(exact(rope, fresh, old)).bfloat16()
    moved = rope.rotate(stored, torch.from_numpy(new - old)).double().numpy()
    # Rounding errors of both components of a pair mix: sqrt(2) of one, for magnitudes to sqrt(2).
    bound = 2**-8 * (np.sqrt(2) + 1)
    assert np.abs(moved - exact(rope, fresh, new)).max() < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("style", ["neox", "gptj"])
def test_what_does_not_move_keeps_its_bits(dtype: torch.dtype, style: str) -> None:
    rope, keys = plain(style, 48), (some_keys().double() / 3).to(dtype)
    keys[0, 0] = -0.0
    halves = (slice(0, 24), slice(24, 48), slice(0, 48, 2), slice(1, 48, 2))
    for token, half in enumerate(halves):
        keys[1 + token, :, half] = -0.0
    before = keys.clone()
    deltas = torch.zeros(TOKENS, dtype=torch.int64)
    deltas[5] = 9

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.uint8)

    for delta in (0, deltas * 0):
        moved = rope.rotate(keys, delta)
        assert torch.equal(bits(moved), bits(before))
        assert moved.data_ptr() != keys.data_ptr()
    moved = rope.rotate(keys, deltas)
    still = deltas == 0
    assert torch.equal(bits(moved[still]), bits(before[still]))
    assert not torch.equal(moved[5, :, :48], before[5, :, :48])
    assert torch.equal(bits(moved[5, :, 48:]), bits(before[5, :, 48:]))
    assert torch.equal(bits(keys), bits(before))


@pytest.mark.parametrize("style", ["neox", "gptj"])
def test_all_layers_at_once_and_views(style: str) -> None:
    rope = plain(style, 48)
    layers = torch.stack([some_keys(seed=seed) for seed in range(3)])
    deltas = torch.arange(TOKENS) * 3 - 20
    one_by_one = torch.stack([rope.rotate(keys, deltas) for keys in layers])
    assert torch.equal(rope.rotate(layers, deltas), one_by_one)
    cos, sin = rope.cos_sin(deltas)
    assert torch.equal(rope.rotate_by(layers[1], cos, sin), one_by_one[1])
    view = layers.transpose(1, 2).contiguous().transpose(1, 2)
    assert not view.is_contiguous()
    assert torch.equal(rope.rotate(view, deltas), one_by_one)
    assert rope.rotate(layers[:, :0], deltas[:0]).shape == (3, 0, HEADS, 64)


def table_of(inv_freq: Tensor, rows: int, scale: float = 1.0) -> Tensor:
    """As vLLM computes its table: angles in float32, [rows, rotary_dim] = cos | sin."""
    angle = np.arange(rows, dtype=np.float32)[:, None] * inv_freq.numpy().astype(np.float32)
    table = np.concatenate((np.cos(angle), np.sin(angle)), -1) * np.float32(scale)
    return torch.from_numpy(table)


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("rows", [64, 1000, 40_000])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2e-4), (torch.float16, 1e-3), (torch.bfloat16, 1e-3)]
)
def test_table_gives_the_rotation_back(
    scaling: str, rows: int, dtype: torch.dtype, limit: float
) -> None:
    settings = SCALINGS[scaling]
    config = {"model_type": "llama", **SMALL, "rope_theta": 1e6, "rope_scaling": settings}
    want = Rope.from_config(config)
    factor = want.attention_factor
    got = Rope.from_table(table_of(want.inv_freq, rows, factor).to(dtype), 64, True)
    assert (got.inv_freq - want.inv_freq).abs().max() * rows < limit
    assert got.attention_factor == pytest.approx(factor, rel=torch.finfo(dtype).eps)
    assert got.style == "neox"
    keys = some_keys()
    np.testing.assert_allclose(
        got.rotate(keys, 1 - rows).numpy(), exact(want, keys, 1 - rows), rtol=0, atol=2 * limit
    )


def test_table_of_the_interleaved_style_and_of_pairs_that_stand_still() -> None:
    inv_freq = torch.tensor([1.0, 0.1, 0.0, 0.0])
    rope = Rope.from_table(table_of(inv_freq, 2), 8, False)
    assert rope.style == "gptj"
    torch.testing.assert_close(rope.inv_freq, inv_freq.double(), rtol=1e-6, atol=0)
    keys = some_keys(8)
    assert torch.equal(rope.rotate(keys, 11)[..., 4:], keys[..., 4:])


def two_tables() -> Tensor:
    """LongRoPE as vLLM keeps it: rows of the short factors, then rows of the long ones."""
    inv_freq = plain().inv_freq
    return torch.cat((table_of(inv_freq, 512), table_of(inv_freq / 4, 2048)))


def broken_row(row: int, value: float) -> Tensor:
    table = table_of(plain().inv_freq, 3000)
    table[row, 5] += value
    return table


TABLES: list[tuple[Tensor, int, str]] = [
    (two_tables(), 64, r"not that of plain RoPE: row \d+ is off by"),
    (two_tables().bfloat16(), 64, r"not that of plain RoPE: row \d+ is off by"),
    (table_of(plain().inv_freq, 900) ** 2, 64, "not that of plain RoPE"),
    (torch.rand(100, 64), 64, "not that of plain RoPE"),
    (torch.zeros(100, 64), 64, "not that of plain RoPE"),
    *((broken_row(row, 0.01), 64, f"row {row} is off by 0.0") for row in (2, 17, 1000, 2999)),
    (broken_row(1000, float("nan")), 64, r"plain RoPE: row \d+ is off by nan"),
    (table_of(plain().inv_freq, 100), 32, r"shape \[100, 64\] .* rotary_dim = 32\]"),
    (table_of(plain().inv_freq, 1), 64, r"shape \[1, 64\] .* expected \[max_position >= 2"),
    (torch.zeros(9, 64, dtype=torch.int32), 64, r"dtype torch.int32; .* of floats"),
]


@pytest.mark.parametrize(("table", "rotary_dim", "message"), TABLES)
def test_table_of_something_else_is_refused(table: Tensor, rotary_dim: int, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        Rope.from_table(table, rotary_dim, True)
    assert "without blending" in caught.value.hint


def scaled(**rope: Any) -> dict[str, Any]:
    return {"rope_scaling": rope}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "deepseek_v3"}, "model type 'deepseek_v3' is not known"),
    ({"model_type": "cohere2"}, "model type 'cohere2' is not known"),
    ({"model_type": None}, "model type None is not known"),
    (scaled(rope_type="dynamic", factor=2.0), "RoPE type 'dynamic' is not supported"),
    (scaled(type="su", long_factor=[1.0]), "RoPE type 'su' is not supported"),
    (scaled(rope_type="longrope"), "RoPE type 'longrope' is not supported"),
    (scaled(rope_type="proportional"), "RoPE type 'proportional' is not supported"),
    (scaled(type="mrope"), "RoPE type 'mrope' is not supported"),
    (scaled(rope_type="default", mrope_section=[16, 24, 24]), "the config sets mrope_section"),
    (scaled(rope_type="default", use_fope=True), "the config sets use_fope"),
    ({"dual_chunk_attention_config": {"chunk_size": 8}}, "sets dual_chunk_attention_config"),
    ({"layer_rope_theta": [0, 1e4]}, "the config sets layer_rope_theta"),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}},
        r"RoPE differs by layer type \['full_attention', 'sliding_attention'\]",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but models of type 'llama'"),
    ({"head_dim": 65}, "rotary dimension 65 is not even"),
    ({"hidden_size": None}, "a config without head_dim needs hidden_size, got None"),
    ({"model_type": "gptj"}, "model type 'gptj' needs rotary_dim, got None"),
    ({"rope_theta": "1e6"}, "RoPE needs rope_theta, got '1e6'"),
    (scaled(rope_type="linear"), "RoPE type 'linear' needs factor, got None"),
    (scaled(**{**LLAMA3, "low_freq_factor": True}), "'llama3' needs low_freq_factor, got True"),
    (scaled(rope_type="yarn", factor=2.0), "'yarn' needs original_max_position_embeddings"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_config_that_is_not_plain_rope_is_refused(change: dict[str, Any], message: str) -> None:
    config = {"model_type": "llama", **SMALL}
    Rope.from_config(config)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        Rope.from_config({**config, **change})
    assert caught.value.hint
    assert caught.value.hint in str(caught.value)


def test_arguments_that_do_not_fit_are_refused() -> None:
    rope, keys = plain(), some_keys()
    with pytest.raises(BlendError, match=r"delta has shape \[3\]; expected \[24\]"):
        rope.rotate(keys, torch.arange(3))
    with pytest.raises(BlendError, match=r"delta has dtype torch\.float32; expected integers"):
        rope.rotate(keys, torch.zeros(TOKENS))
    with pytest.raises(BlendError, match=r"keys have shape \[24, 3, 32\] .* head_size >= 64"):
        rope.rotate(keys[..., :32], 1)
    with pytest.raises(BlendError, match=r"keys have shape \[3, 64\]"):
        rope.rotate(keys[0], torch.arange(3))
    with pytest.raises(BlendError, match=r"torch\.float8_e4m3fn.*dequantised first"):
        rope.rotate(keys.to(torch.float8_e4m3fn), 1)
    with pytest.raises(BlendError, match=r"cos and sin have shapes \[3, 32\].*expected \[24, 32\]"):
        rope.rotate_by(keys, *rope.cos_sin(torch.arange(3)))
    with pytest.raises(BlendError, match=r"inv_freq of shape \[2, 2\] and style 'neox'"):
        Rope(torch.zeros(2, 2))
    with pytest.raises(BlendError, match="style 'Neox'; expected"):
        Rope(torch.zeros(2), "Neox")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("style", ["neox", "gptj"])
def test_cuda_does_not_wait_and_agrees_with_the_cpu(style: str) -> None:
    rope, keys = plain(style, 48), some_keys()
    deltas = torch.arange(TOKENS) * 40_009 - 500_000
    on_device, deltas_there = keys.cuda(), deltas.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = [rope.rotate(on_device, d) for d in (deltas, deltas_there)]
        by_one = rope.rotate(on_device, -77_777)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got in moved:
        torch.testing.assert_close(got.cpu(), rope.rotate(keys, deltas), rtol=0, atol=2e-6)
    torch.testing.assert_close(by_one.cpu(), rope.rotate(keys, -77_777), rtol=0, atol=2e-6)
