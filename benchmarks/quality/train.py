"""Train a small Llama on CS-MQAR, and judge whether a gain over plain KV reuse can show on it.

    python -m benchmarks.quality.train --out FOLDER --seconds 450

Owns the recipe: the stages of the curriculum, the losses, the initialisation and the gate.  Writes
a model folder (bfloat16) and training.json; a crash leaves nothing, or no training.json.  Exits
with 1 when the gate is missed: methods of blending cannot be told apart where full prefill fails,
or plain reuse does not.  What lets the model get beyond matching the attribute alone: a loss by
which layer 1 knows the current subject (its probe is not saved); keys equal to queries at the start
in the upper layers, as a match of similar states; a curriculum by mastery.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing as mp
import os
import platform
import time
from collections import deque
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from benchmarks.quality import csmqar
from benchmarks.quality.csmqar import FAMILIES, Batch, Family, Spec
from benchmarks.quality.words import write_tokenizer

VOCABULARY = 256  # the task's tokens and room above them
ROPE_THETA, NORM_EPS = 10_000.0, 1e-5
PROBE, PROBED_LAYER = "probe.weight", 1
LEARNING_RATE, WARMUP_STEPS = 1e-3, 200
NUM_QUERIES, STEP_TOKENS = 16, 49_152
AHEAD, BATCH_DEADLINE_S = 40, 120.0  # batches drawn ahead
GATE_EVERY, MASTERED = 50, 0.95  # steps; accuracy of cross and of intra answers
LENGTHS = (1, 2, 4, 6, 8, 8, 12, 16)  # chunks; 1, so that a chunk alone behind BOS is no surprise

Weights: TypeAlias = dict[str, Tensor]  # by their names in transformers' LlamaForCausalLM


@dataclass(frozen=True)
class Stage:
    families: dict[Family, float]  # and their shares of the batches
    chunks: tuple[int, ...]
    pairs: int
    attributes: int
    until: float  # share of the training time after which the next stage begins anyway


STAGES = (
    Stage({"B": 1.0}, (4,), pairs=15, attributes=1, until=0.2),
    Stage({"B": 1.0}, (4,), pairs=31, attributes=2, until=0.35),
    Stage({"B": 1.0}, (4,), pairs=63, attributes=16, until=0.55),
    Stage({"A": 0.25, "B": 0.5, "E": 0.25}, LENGTHS, pairs=63, attributes=16, until=0.7),
    Stage({"A": 0.15, "B": 0.3, "C": 0.4, "E": 0.15}, LENGTHS, pairs=63, attributes=16, until=1.0),
)


@dataclass(frozen=True)
class Shape:
    """The sizes of the model.  Raises ValueError if they do not fit each other."""

    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads or self.layers < 2:
            raise ValueError(f"{self}; expected even head widths, kv_heads | heads, layers > 1")


def initial_weights(shape: Shape, device: str) -> Weights:
    """Float32 leaves that take gradients, the probe's among them."""
    layers, hidden, wide = shape.layers, shape.hidden, shape.hidden * 5 // 2
    kv_width = hidden // shape.heads * shape.kv_heads
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    sizes = {f"model.layers.{n}.{k}.weight": v for n in range(layers) for k, v in of_layer.items()}
    sizes |= {"model.norm.weight": (hidden,), PROBE: (csmqar.ENTITIES, hidden)}
    sizes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, hidden))
    weights = {name: torch.ones(size) for name, size in sizes.items()}
    for name, weight in weights.items():
        if weight.dim() == 2:
            std = 0.7 if "embed_tokens" in name else weight.shape[1] ** -0.5
            into_residual = "o_proj" in name or "down_proj" in name
            weight.normal_(0.0, std / math.sqrt(2 * layers) if into_residual else std)
    for layer in range(layers // 2, layers):
        q, k = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qk")
        heads = k.unflatten(0, (shape.kv_heads, -1))
        q.copy_(heads.repeat_interleave(shape.heads // shape.kv_heads, 0).flatten(0, 1))
    return {name: weight.to(device).requires_grad_() for name, weight in weights.items()}


def forward(
    weights: Weights, shape: Shape, tokens: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, vocabulary] of ``tokens`` [B, T], and the states after the probed layer.

    ``mask`` [T, T] is True where a row may attend to a column; None means all up to itself.
    """
    x = functional.embedding(tokens, weights["model.embed_tokens.weight"])
    head_dim = shape.hidden // shape.heads
    step = torch.arange(0, head_dim, 2, device=tokens.device) / head_dim
    # In float32 also where the weights are bfloat16, in which far positions would fall together.
    angle = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), ROPE_THETA**-step)
    rope, probed = torch.stack([angle.cos(), angle.sin()]), x
    for layer in range(shape.layers):
        x = _layer(weights, f"model.layers.{layer}", shape, x, rope, mask)
        probed = x if layer == PROBED_LAYER else probed
    x = _norm(x, weights["model.norm.weight"])
    return functional.linear(x, weights["lm_head.weight"]), probed


def _norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, NORM_EPS)


def _layer(
    weights: Weights, at: str, shape: Shape, x: Tensor, rope: Tensor, mask: Tensor | None
) -> Tensor:
    def linear(name: str, states: Tensor) -> Tensor:
        return functional.linear(states, weights[f"{at}.{name}_proj.weight"])

    def heads(name: str) -> Tensor:
        states = linear(f"self_attn.{name}", h)
        return states.view(*x.shape[:2], -1, 2 * rope.shape[-1]).transpose(1, 2)

    def rotated(states: Tensor) -> Tensor:
        (low, high), (cos, sin) = states.chunk(2, -1), rope
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(states.dtype)

    h = _norm(x, weights[f"{at}.input_layernorm.weight"])
    q, k, v = rotated(heads("q")), rotated(heads("k")), heads("v")
    k, v = (kv.repeat_interleave(shape.heads // shape.kv_heads, 1) for kv in (k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    x = x + linear("self_attn.o", mixed.transpose(1, 2).flatten(2))
    h = _norm(x, weights[f"{at}.post_attention_layernorm.weight"])
    return x + linear("mlp.down", functional.silu(linear("mlp.gate", h)) * linear("mlp.up", h))


def draw(seed: int, number: int, stage: Stage, step_tokens: int) -> Batch:
    """A batch of about ``step_tokens`` tokens, of one family and one length drawn for it."""
    rng = csmqar.training_rng(seed, number)
    family = FAMILIES[rng.choice(4, p=[stage.families.get(name, 0.0) for name in FAMILIES])]
    spec = Spec(family, int(rng.choice(stage.chunks)), stage.pairs, stage.attributes)
    rows = step_tokens // (spec.context_tokens + NUM_QUERIES * csmqar.QUERY_TOKENS)
    return csmqar.make_batch(rng, max(rows, 1), spec, NUM_QUERIES)


def batches(
    stage: list[int], seed: int, workers: int, step_tokens: int
) -> Generator[Batch, None, None]:
    """Batches of the stage that ``stage[0]`` names at the time, drawn ahead by other processes."""
    # Forked, so that they start at once: this process has no threads and uses no GPU yet.
    with mp.get_context("fork").Pool(workers) as pool:
        ahead: deque[tuple[int, Any]] = deque()
        for number in itertools.count():
            drawn = (seed, number, STAGES[stage[0]], step_tokens)
            ahead.append((stage[0], pool.apply_async(draw, drawn)))
            if len(ahead) > AHEAD:
                drawn_for, result = ahead.popleft()
                if drawn_for == stage[0]:
                    yield result.get(BATCH_DEADLINE_S)


def losses(weights: Weights, shape: Shape, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss to descend, and which answers were right [rows, queries]."""
    arrays = [torch.from_numpy(array) for array in (batch.tokens, batch.subjects, batch.asked)]
    if weights[PROBE].is_cuda:
        arrays = [array.pin_memory().to("cuda", non_blocking=True) for array in arrays]
    tokens, subjects, asked = arrays[0].long(), arrays[1].long(), arrays[2]
    logits, probed = forward(weights, shape, tokens[:, :-1])
    # Slices: an index array would be copied to the GPU, which waits for all that is queued there.
    first, step = int(batch.answer_positions[0]), csmqar.QUERY_TOKENS
    answers, targets = logits[:, first::step], tokens[:, first + 1 :: step]
    subject = functional.linear(_norm(probed), weights[PROBE])

    def entropy(guessed: Tensor, truth: Tensor) -> Tensor:
        guessed, truth = guessed.float().flatten(0, 1), truth.flatten()
        return functional.cross_entropy(guessed, truth, ignore_index=csmqar.NO_SUBJECT)

    loss = entropy(answers, targets.masked_fill(~asked, csmqar.NO_SUBJECT))
    loss = loss + 0.01 * entropy(logits, tokens[:, 1:]) + 0.3 * entropy(subject, subjects[:, :-1])
    return loss, answers.argmax(-1) == targets


def train(
    shape: Shape, seconds: float, seed: int, device: str, workers: int, step_tokens: int
) -> tuple[Weights, dict[str, Any]]:
    """Train for ``seconds``; returns float32 weights, and when which stage began."""
    stage = [0]
    source = batches(stage, seed, workers, step_tokens)
    batch = next(source)
    torch.manual_seed(seed)
    weights = initial_weights(shape, device)
    adam = torch.optim.AdamW(weights.values(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    started, share, step, stages = time.monotonic(), 0.0, 0, [0.0]
    while share < 1.0:
        step += 1
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))
        adam.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS) * decay
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, right = losses(weights, shape, batch)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        adam.step()
        share = (time.monotonic() - started) / seconds
        if step % GATE_EVERY == 0:
            kinds = (batch.cross, batch.asked & ~batch.cross)
            hits = right.cpu().numpy()
            accuracy = [hits[kind].mean() if kind.any() else 0.0 for kind in kinds]
            print(f"{share:.0%} step {step} stage {stage[0]}", *accuracy, flush=True)
            done = share > STAGES[stage[0]].until or min(accuracy) > MASTERED
            if done and stage[0] + 1 < len(STAGES):
                stage[0] += 1
                stages.append(time.monotonic() - started)
        batch = next(source)
    source.close()
    return weights, {"steps": step, "seconds": share * seconds, "stages_began_s": stages}


@torch.no_grad()
def evaluate(weights: Weights, shape: Shape, spec: Spec, prompts: int) -> dict[str, Any]:
    """Accuracy on held-out prompts: `full` prefill, and `reuse`, each chunk alone behind BOS."""
    batch = csmqar.make_batch(csmqar.held_out_rng(0), prompts, spec, NUM_QUERIES)
    tokens = torch.from_numpy(batch.tokens).to(weights[PROBE].device).long()
    position = torch.arange(tokens.shape[1], device=tokens.device)
    chunk = (position - 1) // spec.chunk_tokens
    sees_all = (position >= spec.context_tokens)[:, None]
    alone = (sees_all | (chunk[:, None] == chunk) | (position == 0)).tril()
    kinds = {"cross": batch.cross, "intra": batch.asked & ~batch.cross}
    score: dict[str, Any] = {"family": spec.family, "chunks": spec.chunks}
    for way, mask in {"full": None, "reuse": alone}.items():
        logits = [forward(weights, shape, rows, mask)[0] for rows in tokens.split(8)]
        answers = torch.cat(logits)[:, batch.answer_positions].argmax(-1)
        right = (answers == tokens[:, batch.answer_positions + 1]).cpu().numpy()
        for kind, of_kind in kinds.items():
            score[f"{way}_{kind}"] = float(right[of_kind].mean()) if of_kind.any() else None
    score["guess_cross"] = csmqar.guessed_share(batch)
    return score


def misses(score: dict[str, Any]) -> list[str]:
    """Which accuracies miss the gate: reuse fails on half of the cross facts, and nothing else."""
    bounds = {"full_cross": (0.99, 1.0), "full_intra": (0.99, 1.0), "reuse_intra": (0.98, 1.0)}
    bounds["reuse_cross"] = (0.0, min(0.5, (score["guess_cross"] or 0.0) + 0.05))
    return [
        f"{score['family']}, {score['chunks']} chunks: {name} {score[name]:.3f}, gate {bound}"
        for name, bound in bounds.items()
        if score[name] is not None and not bound[0] <= score[name] <= bound[1]
    ]


def save(weights: Weights, shape: Shape, folder: Path) -> None:
    """Write an ordinary model folder, which `from_pretrained` and vLLM load."""
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"intermediate_size": len(weights["model.layers.0.mlp.up_proj.weight"])}
    config |= {"hidden_size": shape.hidden, "head_dim": shape.hidden // shape.heads}
    config |= {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}
    config |= {"num_key_value_heads": shape.kv_heads, "vocab_size": VOCABULARY}
    config |= {"bos_token_id": csmqar.BOS, "eos_token_id": csmqar.PAD, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 8192, "rope_theta": ROPE_THETA, "rms_norm_eps": NORM_EPS}
    config |= {"torch_dtype": "bfloat16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_tokenizer(folder)
    kept = {name: w.cpu() for name, w in weights.items() if name != PROBE}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small Llama on CS-MQAR and judge it.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--judge-chunks", type=int, nargs="+", default=(4, 8, 16))
    workers = max(1, (os.cpu_count() or 2) - 2)
    options = {"seconds": 450.0, "seed": 0, "workers": workers, "step-tokens": STEP_TOKENS}
    for name, value in (options | {"judge-prompts": 96} | asdict(Shape())).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"default: {value}")
    args = vars(parser.parse_args(arguments))
    (out := args.pop("out")).mkdir(parents=True, exist_ok=True)
    shape = Shape(**{name: args[name] for name in asdict(Shape())})
    how = {name: args[name] for name in ("seconds", "seed", "device", "workers", "step_tokens")}
    weights, history = train(shape, **how)
    weights = {name: weight.detach().bfloat16() for name, weight in weights.items()}
    save(weights, shape, out)
    specs = [Spec(family, chunks) for chunks in args["judge_chunks"] for family in FAMILIES]
    scores = [evaluate(weights, shape, spec, args["judge_prompts"]) for spec in specs]
    missed = [miss for score in scores for miss in misses(score)]
    gpu = torch.cuda.get_device_name() if args["device"] == "cuda" else platform.machine()
    history |= {"machine": gpu, "cpus": os.cpu_count()}
    history |= {"torch": torch.__version__, "python": platform.python_version()}
    history |= {"arguments": args, "gate": scores, "missed": missed}
    (out / "training.json").write_text(json.dumps(history, indent=1) + "\n")
    if missed:
        raise SystemExit("gate missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
