"""A LoRA adapter folder as PEFT writes it, with random weights large enough to show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RANK = 4


def make_adapter(folder: Path, model: Path, seed: int) -> Path:
    """Write an adapter of the query, key and value projections of a model made for these tests."""
    config = json.loads((model / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    sizes = {
        "q_proj": config["num_attention_heads"] * head,
        "k_proj": config["num_key_value_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
    }
    rng = np.random.default_rng(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in sizes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = rng.standard_normal((RANK, hidden), dtype=np.float32)
            up = rng.standard_normal((size, RANK), dtype=np.float32)
            weights[f"{at}.lora_A.weight"] = down * np.float32(hidden**-0.5)
            weights[f"{at}.lora_B.weight"] = up * np.float32(0.5)
    folder.mkdir()
    save_file(weights, str(folder / "adapter_model.safetensors"))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(sizes),
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
