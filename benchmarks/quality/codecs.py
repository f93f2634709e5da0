"""What rounding KV to 8 bits does to a model's answers.

``python -m benchmarks.quality.codecs [--models FOLDER ...] [--json] [--check] [--quick]``

On CS-MQAR prompts of held-out seeds: the KV of the context, in bfloat16 and in chunks of 64 tokens,
is rounded and read as engines do (`blend.rounding`), and the model has it while it
computes the queries (the slow reference, in float32). A row for each family and codec: relative
error of K and of V, KL of the next-token distributions in nats (exact KV || what came back), at the
answers and at all tokens behind the context, how often both would say the same token, and right
answers. ``bfloat16`` is rounding to that dtype alone, without a codec: the floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.__main__ import MODELS, QUERIES
from benchmarks.quality.cases import load
from benchmarks.quality.csmqar import FAMILIES, Batch, Family, Spec, held_out_rng, make_batch
from benchmarks.quality.measure import divergence
from benchmarks.table import Bar, add_arguments, report
from blend import reference
from blend.reference import KeyValues
from blend.rounding import Rounding
from prefixstore.codec import LOSSY_NAMES
from prefixstore.codec.rounded import rounded_layout
from prefixstore.layout import Layout

CHUNK_TOKENS, CONTEXT_CHUNKS, BATCH = 64, 8, 8
FLOOR = "bfloat16"
KL_MAX, LOST_MAX = 0.01, 0.005
Rows = list[dict[str, object]]


def there_and_back(codec: str, kv: Tensor) -> Tensor:
    """What is left of chunks of KV, ``[n, layer, plane, head, token, dim]``, as an engine whose KV
    is of that dtype stores and loads them; with `FLOOR` all is."""
    if codec == FLOOR:
        return kv
    _, layers, planes, heads, tokens, size = kv.shape
    plain = Layout(layers, planes, heads, tokens, size * kv.element_size())
    layout = rounded_layout(codec, plain, str(kv.dtype).removeprefix("torch."))
    rounding = Rounding(codec, (layers, planes, heads, tokens, size), kv.dtype, layout.piece_bytes)
    out = torch.empty((len(kv), layout.payload_bytes), dtype=torch.uint8, device=kv.device)
    rounding.encode(kv, out)
    return rounding.decode(out)


def coded(key_values: KeyValues, codec: str) -> tuple[KeyValues, int]:
    """KV whose whole chunks were rounded to bfloat16 and by a codec, and how many tokens of a
    prompt these are."""
    layers = [torch.stack(pair, 1) for pair in key_values]
    whole = torch.stack(layers, 1)  # [prompt, layer, plane, head, token, dim]
    tokens = whole.shape[4] // CHUNK_TOKENS * CHUNK_TOKENS
    for at in range(0, tokens, CHUNK_TOKENS):
        chunk = whole[:, :, :, :, at : at + CHUNK_TOKENS]
        chunk.copy_(there_and_back(codec, chunk.bfloat16()))
    return [(layer[:, 0], layer[:, 1]) for layer in whole.unbind(1)], tokens


def make_prompts(
    family: Family, size: int, seed: int, context_chunks: int = CONTEXT_CHUNKS
) -> tuple[Spec, Batch, Tensor]:
    """Prompts of a held-out seed, and their ids."""
    spec = Spec(family=family, chunks=context_chunks)
    batch = make_batch(held_out_rng(seed), size, spec, QUERIES)
    return spec, batch, torch.from_numpy(batch.tokens.astype("int64"))


def context_of(spec: Spec, key_values: KeyValues) -> KeyValues:
    """The KV of the context alone."""
    return [(k[:, :, : spec.context_tokens], v[:, :, : spec.context_tokens]) for k, v in key_values]


@torch.inference_mode()
def measure(
    model: Any, family: Family, size: int, seed: int, context_chunks: int = CONTEXT_CHUNKS
) -> Iterator[dict[str, Any]]:
    """Of one batch, for each codec: means, and counts of answers."""
    spec, batch, ids = make_prompts(family, size, seed, context_chunks)
    ids = ids.to(model.device)
    full = reference.forward(model, ids)
    asked = torch.from_numpy(batch.asked).to(model.device)
    at = torch.from_numpy(batch.answer_positions.astype("int64")).to(model.device)
    answers = ids[:, at + 1]
    right = _right(full.logits[:, at], answers, asked)
    yield {"codec": "", "right": right, "asked": int(asked.sum())}
    exact = context_of(spec, full.key_values)
    for name in (FLOOR, *LOSSY_NAMES):
        context, tokens = coded(exact, name)
        cached = [
            tuple(torch.cat([part, rest[:, :, spec.context_tokens :]], 2)
                  for part, rest in zip(pair, whole, strict=True))
            for pair, whole in zip(context, full.key_values, strict=True)
        ]  # fmt: skip
        fresh = (torch.arange(ids.shape[1], device=ids.device) >= tokens).expand(ids.shape)
        found = reference.forward(
            model, ids, cached=[(k, v) for k, v in cached], fresh=[fresh] * len(cached)
        )
        kl = divergence(full.logits[:, tokens:], found.logits[:, tokens:])
        same = found.logits[:, at].argmax(-1) == full.logits[:, at].argmax(-1)
        yield {
            "codec": name,
            "error_k": _error(context, exact, 0),
            "error_v": _error(context, exact, 1),
            "kl": float(divergence(full.logits[:, at], found.logits[:, at])[asked].mean()),
            "kl_all": float(kl.mean()),
            "same": float(same[asked].float().mean()),
            "right": _right(found.logits[:, at], answers, asked),
            "asked": int(asked.sum()),
        }


def _right(logits: Tensor, answers: Tensor, asked: Tensor) -> int:
    return int(((logits.argmax(-1) == answers) & asked).sum())


def _error(found: KeyValues, truth: KeyValues, plane: int) -> float:
    wrong = sum(float((one[plane] - two[plane]).square().sum())
                for one, two in zip(found, truth, strict=True))  # fmt: skip
    return float((wrong / sum(float(two[plane].square().sum()) for two in truth)) ** 0.5)


def rows_of(model: str, family: str, batches: Sequence[Sequence[dict[str, Any]]]) -> Rows:
    """One row a codec."""
    rows: Rows = []
    for parts in list(zip(*batches, strict=True))[1:]:
        exact = sum(batch[0]["right"] for batch in batches)
        count = sum(part["asked"] for part in parts)
        means = {
            name: fmean(part[name] for part in parts)
            for name in ("error_k", "error_v", "kl", "kl_all", "same")
        }
        rows.append({
            "model": model, "family": family, "codec": parts[0]["codec"], **means,
            "right": sum(part["right"] for part in parts) / count, "right_exact": exact / count,
            "answers": count,
        })  # fmt: skip
    return rows


def bars_of(rows: Rows) -> list[Bar]:
    """Of lossy codecs: answers stay close, and as many of them right."""
    made = []
    for row in rows:
        if row["codec"] != FLOOR:
            name = f"{row['model']}, {row['family']}, {row['codec']}"
            lost = float(str(row["right_exact"])) - float(str(row["right"]))
            made.append(Bar(f"{name}: KL at the answers", float(str(row["kl"])), KL_MAX, "<="))
            made.append(Bar(f"{name}: answers lost", lost, LOST_MAX, "<="))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.codecs")
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", type=Path, help="folders; default: those in models/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=32, help="for each family")
    parser.add_argument("--quick", action="store_true", help="a moment's work, to see it run")
    args = parser.parse_args(argv)
    folders = args.models or sorted(path.parent for path in MODELS.glob("*/model.safetensors"))
    if not folders:
        raise SystemExit(f"no model in {MODELS}: train one with python -m benchmarks.quality.train")
    families, size, batches = FAMILIES, BATCH, max(1, args.prompts // BATCH)
    if args.quick:
        families, size, batches = ("B",), 2, 1
    rows: Rows = []
    for folder in folders:
        model = load(folder, args.device)
        for family in families:
            print(f"{folder.name}: family {family}", file=sys.stderr, flush=True)
            found = [list(measure(model, family, size, seed)) for seed in range(batches)]
            rows += rows_of(folder.name, family, found)
    report("codecs: CS-MQAR behind a context that went through a codec", rows,
           [] if args.quick else bars_of(rows), args)  # fmt: skip


if __name__ == "__main__":
    main()
