"""What lossy codecs do to a model's answers.

``python -m benchmarks.quality.codecs [--models FOLDER ...] [--json] [--check] [--quick]``

On CS-MQAR prompts of held-out seeds: the KV of the context, in bfloat16 and in chunks of 64 tokens,
goes through a codec as it does on its way to a pool and back, and the model reads it while it
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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.quality.__main__ import MODELS, QUERIES
from benchmarks.quality.cases import load
from benchmarks.quality.csmqar import FAMILIES, Batch, Family, Spec, held_out_rng, make_batch
from benchmarks.quality.measure import divergence
from benchmarks.table import Bar, add_arguments, report
from blend import reference
from blend.reference import KeyValues
from prefixstore.codec import LOSSY_NAMES
from prefixstore.codec.form import Codec, Form
from prefixstore.codec.lossy import from_float32, to_float32
from prefixstore.codec.registry import BY_NAME
from prefixstore.layout import Layout

CHUNK_TOKENS, CONTEXT_CHUNKS, BATCH = 64, 8, 8
FLOOR = "bfloat16"
KL_MAX, LOST_MAX = 0.01, 0.005
Rows = list[dict[str, object]]
Array = npt.NDArray[np.float32]


def form_of(key_values: KeyValues, dtype: str) -> Form:
    """Of chunks of this KV."""
    _, heads, _, size = key_values[0][0].shape
    width = {"float32": 4}.get(dtype, 2)
    return Form(Layout(len(key_values), 2, heads, CHUNK_TOKENS, size * width), dtype)


def chunks(key_values: KeyValues) -> Iterator[Array]:
    """Whole chunks of each prompt in turn: float32 [layer, plane, head, token, dim]."""
    for layers in _stacked(key_values):
        for at in range(0, layers.shape[3] - CHUNK_TOKENS + 1, CHUNK_TOKENS):
            yield np.ascontiguousarray(layers[:, :, :, at : at + CHUNK_TOKENS])


def _stacked(key_values: KeyValues) -> Array:
    """[prompt, layer, plane, head, token, dim]."""
    layers = [torch.stack(pair, 1) for pair in key_values]
    found: Array = torch.stack(layers, 1).float().cpu().numpy()
    return found


def payload_of(chunk: Array, dtype: str) -> memoryview:
    """A chunk's bytes in a pool, before a codec."""
    return memoryview(from_float32(chunk, dtype).tobytes())


def there_and_back(codec: Codec | None, form: Form, payload: memoryview) -> Array:
    """What a codec leaves of a chunk; None: the dtype alone. RuntimeError if it takes none."""
    out = payload
    if codec is not None:
        pieces = codec.encode(form, payload)
        if pieces is None:
            raise RuntimeError(f"{codec.name} does not take a chunk of this model")
        out = memoryview(bytearray(payload.nbytes))
        codec.decode(form, range(len(pieces)), [memoryview(one) for one in pieces], out)
    layout = form.layout
    shape = (layout.num_layers, 2, layout.num_heads, layout.chunk_tokens, form.head_size)
    return to_float32(np.frombuffer(out, np.uint8), form.dtype).reshape(shape)


def coded(key_values: KeyValues, codec: Codec | None) -> tuple[KeyValues, int]:
    """KV whose whole chunks went through a codec, and how many tokens of a prompt these are."""
    form = form_of(key_values, "bfloat16")
    whole = _stacked(key_values)
    tokens = whole.shape[4] // CHUNK_TOKENS * CHUNK_TOKENS
    back = [there_and_back(codec, form, payload_of(one, form.dtype)) for one in chunks(key_values)]
    per_prompt = tokens // CHUNK_TOKENS
    for number, chunk in enumerate(back):
        prompt, at = divmod(number, per_prompt)
        whole[prompt][:, :, :, at * CHUNK_TOKENS : (at + 1) * CHUNK_TOKENS] = chunk
    device = key_values[0][0].device
    layers = torch.from_numpy(whole).to(device).unbind(1)
    return [(layer[:, 0], layer[:, 1]) for layer in layers], tokens


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
        context, tokens = coded(exact, BY_NAME.get(name))
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
