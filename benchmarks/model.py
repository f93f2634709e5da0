"""Make small (or real-size) models with random weights, on this machine, without the network.

Owns the model cache: ordinary Hugging Face folders (config.json, model.safetensors, tokenizer.json,
tokenizer_config.json) that vLLM loads like any other.  What must hold: the same parameters give the
same bytes of weights on every run; a wrong KV shows in the output.  The second is a matter of
scale: with the usual initialisation (std 0.02) attention is close to a mean over all positions, so
a swapped or zeroed KV changes the logits by less than the gap between the best two tokens.  Here
attention scores have a standard deviation of about 2.5, so each head looks at a few positions, and
logits one of 3, so that the best token leads by far more than float32 rounding.

A crash leaves at most a ``.building-*`` folder beside the target: a folder becomes visible by one
rename, and only when its marker file, written last, is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

REPO_ROOT = Path(__file__).resolve().parents[1]
MODEL_CACHE = REPO_ROOT / ".cache" / "models"
END_TOKEN = "<|endoftext|>"
MIN_DEMO_CHARS = 24_000  # about 3.2 characters a token at a vocabulary of 1024: 7500 tokens

_MARKER = "made_by_benchmarks.json"
_RECIPE = 1  # raise when the weights that a set of parameters gives change
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCORE_GAIN = 1.6  # of q and of k: scores then have a std of 1.6 * 1.6
_LOGIT_GAIN = 3.0
_OUT_GAIN = 2.0  # attention's share of the residual stream, beside an embedding of std 1


def make_model(
    folder: str | Path | None,
    *,
    text: str,
    arch: str = "llama",
    layers: int = 4,
    hidden: int = 256,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int | None = None,
    vocab: int = 1024,
    intermediate: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    max_len: int = 8192,
    rope_theta: float = 10000.0,
) -> Path:
    """Write a model folder, or reuse it if it was made with the same parameters; returns its path.

    ``text`` trains the byte-level BPE tokenizer.  ``folder`` None means a folder of the model cache
    named by the parameters.  ``head_dim`` None means 64, or hidden / heads for qwen2, whose
    architecture has no other choice.  ``intermediate`` (the MLP's width) None means 2.75 * hidden.
    ``dtype`` is float32, bfloat16 or float16.  Raises ValueError for parameters no model can have,
    and if ``folder`` holds something that this function did not make.
    """
    if head_dim is None:
        head_dim = hidden // heads if arch == "qwen2" else 64
    params: dict[str, Any] = {
        "recipe": _RECIPE,
        "arch": arch,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": vocab,
        "intermediate": intermediate or 11 * hidden // 4,
        "dtype": dtype,
        "seed": seed,
        "max_len": max_len,
        "rope_theta": rope_theta,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    _check(params)
    if folder is None:
        digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
        target = MODEL_CACHE / f"{arch}-{digest[:12]}"
    else:
        target = Path(folder).resolve()
    if _is_made(target, params):
        return target
    if target.exists() and any(target.iterdir()) and not (target / _MARKER).exists():
        raise ValueError(f"{target} holds files that are not a made model; name an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".building-{target.name}-", dir=target.parent))
    try:
        _write(building, params, text)
        _publish(building, target, params)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def demo_text(min_chars: int = MIN_DEMO_CHARS) -> str:
    """Real English text from this repository: LICENSE, README.md, docs/*.md, then its sources.

    Sources are added, in the order of their paths, only until ``min_chars`` is reached, so the
    prose of a complete checkout comes first and a checkout without docs still gives enough for more
    than 3500 tokens.  The text is not cut.  Raises ValueError if the checkout holds less.
    """
    prose = [REPO_ROOT / "LICENSE", REPO_ROOT / "README.md"]
    prose += sorted((REPO_ROOT / "docs").glob("*.md"))
    parts = [path.read_text(encoding="utf-8") for path in prose if path.is_file()]
    for path in sorted((REPO_ROOT / "benchmarks").glob("*.py")):
        if sum(map(len, parts)) >= min_chars:
            break
        parts.append(path.read_text(encoding="utf-8"))
    text = "\n".join(parts)
    if len(text) < min_chars:
        raise ValueError(f"{REPO_ROOT} gives {len(text)} characters of text, wanted {min_chars}")
    return text


def tokenize(model: str | Path, text: str) -> list[int]:
    """Token ids of ``text`` under a made model's own tokenizer, without special tokens."""
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _check(params: dict[str, Any]) -> None:
    """Refuse what vLLM would refuse later, and less clearly."""
    if params["arch"] not in _ARCHITECTURES:
        raise ValueError(f"arch is {params['arch']!r}; use one of {', '.join(_ARCHITECTURES)}")
    if params["dtype"] not in _DTYPES:
        raise ValueError(f"dtype is {params['dtype']!r}; use one of {', '.join(_DTYPES)}")
    sizes = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "max_len")
    for name in sizes:
        if params[name] < 1:
            raise ValueError(f"{name} is {params[name]}; it must be 1 or more")
    if params["vocab"] < 257:
        raise ValueError(f"vocab is {params['vocab']}; 256 bytes and one special token need 257")
    if params["heads"] % params["kv_heads"]:
        raise ValueError(
            f"heads is {params['heads']}, kv_heads {params['kv_heads']}; heads must be a multiple"
        )
    if params["head_dim"] % 2:
        raise ValueError(f"head_dim is {params['head_dim']}; RoPE needs an even number")
    if params["arch"] == "qwen2" and params["head_dim"] * params["heads"] != params["hidden"]:
        raise ValueError(
            f"qwen2 fixes head_dim to hidden / heads, here {params['hidden']} / {params['heads']}; "
            f"got {params['head_dim']}; leave head_dim out or choose other heads"
        )


def _is_made(target: Path, params: dict[str, Any]) -> bool:
    try:
        marker = json.loads((target / _MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(marker == params)


def _publish(building: Path, target: Path, params: dict[str, Any]) -> None:
    """Rename the finished folder into place; another process may have been faster."""
    if target.exists():
        shutil.rmtree(target)
    try:
        os.rename(building, target)
    except OSError:
        if not _is_made(target, params):
            raise


def _write(folder: Path, params: dict[str, Any], text: str) -> None:
    folder.chmod(0o755)  # mkdtemp's 0700 would keep a server under another user out
    tensors = dict(_weights(params))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _train_tokenizer(text, params["vocab"]).save(str(folder / "tokenizer.json"))
    _dump(folder / "config.json", _config(params))
    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": params["max_len"],
            "eos_token": END_TOKEN,
            "pad_token": END_TOKEN,
            "clean_up_tokenization_spaces": False,
        },
    )
    _dump(folder / _MARKER, params)


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(params: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [_ARCHITECTURES[params["arch"]]],
        "model_type": params["arch"],
        "vocab_size": params["vocab"],
        "hidden_size": params["hidden"],
        "intermediate_size": params["intermediate"],
        "num_hidden_layers": params["layers"],
        "num_attention_heads": params["heads"],
        "num_key_value_heads": params["kv_heads"],
        "head_dim": params["head_dim"],
        "max_position_embeddings": params["max_len"],
        "rope_theta": params["rope_theta"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
        "torch_dtype": params["dtype"],
    }


def _shapes(params: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Name, shape, mean and std of every tensor, in Hugging Face's naming."""
    hidden, inner, arch = params["hidden"], params["intermediate"], params["arch"]
    q_size = params["heads"] * params["head_dim"]
    kv_size = params["kv_heads"] * params["head_dim"]
    # qwen3 normalises q and k again, so there the scale of the scores sits in those norms.
    score = 1.0 if arch == "qwen3" else _SCORE_GAIN
    wide, narrow = hidden**-0.5, inner**-0.5
    yield "model.embed_tokens.weight", (params["vocab"], hidden), 0.0, 1.0
    yield "lm_head.weight", (params["vocab"], hidden), 0.0, _LOGIT_GAIN * wide
    yield "model.norm.weight", (hidden,), 1.0, 0.1
    for layer in range(params["layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,), 1.0, 0.1
        yield at + "post_attention_layernorm.weight", (hidden,), 1.0, 0.1
        yield at + "self_attn.q_proj.weight", (q_size, hidden), 0.0, score * wide
        yield at + "self_attn.k_proj.weight", (kv_size, hidden), 0.0, score * wide
        yield at + "self_attn.v_proj.weight", (kv_size, hidden), 0.0, wide
        yield at + "self_attn.o_proj.weight", (hidden, q_size), 0.0, _OUT_GAIN * q_size**-0.5
        yield at + "mlp.gate_proj.weight", (inner, hidden), 0.0, wide
        yield at + "mlp.up_proj.weight", (inner, hidden), 0.0, wide
        yield at + "mlp.down_proj.weight", (hidden, inner), 0.0, narrow
        if arch == "qwen2":
            # A larger bias adds the same vector at every position, and all prompts answer alike.
            for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                yield at + f"self_attn.{name}_proj.bias", (size,), 0.0, 0.05
        if arch == "qwen3":
            for name in ("q", "k"):
                yield at + f"self_attn.{name}_norm.weight", (params["head_dim"],), _SCORE_GAIN, 0.1


def _weights(params: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Seeded by (seed, tensor name), so that a tensor does not depend on those before it.

    NumPy's generator rather than torch's: torch's normal depends on the CPU's vector width.
    """
    for name, shape, mean, std in _shapes(params):
        generator = np.random.default_rng([params["seed"], zlib.crc32(name.encode())])
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        yield name, torch.from_numpy(values).to(_DTYPES[params["dtype"]])


def _train_tokenizer(text: str, vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer
