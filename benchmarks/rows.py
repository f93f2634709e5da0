"""Attention of rows that are recomputed: our kernel, beside the backend's with a sequence a run.

``python -m benchmarks.rows [--json] [--check] [--tokens 8192 32768] [--share 0.15]``

Needs a GPU, and for what is beside it one of Hopper's. One layer of Llama-3.1-8B's shape (32 query
heads, 8 KV heads of 128, bfloat16, blocks of 16): a share of a prompt's positions attend to all
before them. Positions stand alone, or in runs of 16. Beside it vLLM's FlashAttention, where it is
installed, to which each run is a sequence; and for scale a whole causal prefill of the prompt. ms,
median of 20, and TFLOP/s of what is not masked.

What must hold: attention is torch's in float32, with an explicit mask, within rounding.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_timing import timed
from benchmarks.table import Bar, add_arguments, report
from connector.row_attention import RowAttention

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
SCALE = SIZE**-0.5
CHECKED_ROWS = 64
CLOSE = 2e-2
ALONE, RUNS = "rows alone", "runs of 16"
OURS, SEQUENCES, PREFILL = "kernel", "a sequence a run", "whole causal prefill"


class Prompt:
    """K and V of a prompt in shuffled blocks, on the GPU: of each token and head K, then V."""

    def __init__(self, tokens: int) -> None:
        blocks = tokens // BLOCK
        self.tokens, self.device = tokens, torch.device("cuda")
        shape = (blocks + 1, BLOCK, KV_HEADS, 2 * SIZE)
        self.cache = torch.randn(shape, dtype=torch.bfloat16, device=self.device)
        self.table = (torch.randperm(blocks) + 1).to(self.device)
        self.kernel = RowAttention(HEADS, KV_HEADS, SIZE, torch.bfloat16, self.device)

    def attend(self, query: Tensor, rows: Tensor, out: Tensor) -> None:
        """As a blend does it: copied out of the pages, then the kernel."""
        copied = self.cache[self.table].view(self.tokens, KV_HEADS, 2, SIZE)
        keys, values = copied.permute(2, 1, 0, 3).contiguous()
        self.kernel(query, keys, values, rows, SCALE, out)

    def query(self, rows: int) -> Tensor:
        """Random queries."""
        return torch.randn(rows, HEADS, SIZE, dtype=torch.bfloat16, device=self.device)

    def truth(self, query: Tensor, rows: Tensor) -> Tensor:
        """What they see, in float32."""
        both = self.cache[self.table].flatten(0, 1).float().transpose(0, 1)  # [heads, tokens, 2D]
        keys, values = both.repeat_interleave(HEADS // KV_HEADS, 0).chunk(2, -1)
        mask = torch.arange(self.tokens, device=self.device) <= rows[:, None]
        found = scaled_dot_product_attention(
            query.float().transpose(0, 1), keys, values, attn_mask=mask, scale=SCALE
        )
        return found.transpose(0, 1)

    def sequences(self, query: Tensor, rows: Tensor) -> Callable[[], Tensor]:
        """The same by vLLM's FlashAttention. Raises ImportError."""
        varlen = importlib.import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
        places = rows.cpu()
        begins = torch.cat([torch.ones(1, dtype=torch.bool), places.diff() != 1])
        starts = begins.nonzero().flatten()
        bounds = torch.cat([starts, torch.tensor([len(places)])]).int()
        ends = (places[bounds[1:].long() - 1] + 1).int()
        keys, values = self.cache.chunk(2, -1)
        told = {
            "max_seqlen_q": int(bounds.diff().max()), "cu_seqlens_q": bounds.to(self.device),
            "max_seqlen_k": int(ends.max()), "seqused_k": ends.to(self.device),
            "block_table": self.table.int().expand(len(ends), -1).contiguous(),
            "softmax_scale": SCALE, "causal": True, "fa_version": 3,
        }  # fmt: skip
        return lambda: varlen(query, keys, values, **told)


def ms_of(work: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    return float(statistics.median(timed(work).ms))


def chosen(tokens: int, count: int, run: int) -> Tensor:
    """Positions in runs of so many, at random places, ascending."""
    places = sorted(random.Random(tokens).sample(range(tokens // run), count // run))
    return (torch.tensor(places)[:, None] * run + torch.arange(run)).flatten()


def measure(tokens: int, share: float) -> tuple[list[dict[str, object]], float]:
    """Rows of the table, and the largest error."""
    prompt, rows, worst = Prompt(tokens), [], 0.0

    def add(which: str, how: str, places: Tensor, work: Callable[[], object]) -> None:
        ms = ms_of(work)
        flops = 4 * HEADS * SIZE * float((places + 1).sum())
        rows.append(
            {"tokens": tokens, "positions": which, "by": how, "rows": len(places), "ms": ms,
             "tflop_s": flops / ms / 1e9}
        )  # fmt: skip

    for which, run in ((ALONE, 1), (RUNS, 16)):
        places = chosen(tokens, int(share * tokens), run)
        positions = places.to(prompt.device)
        query = prompt.query(len(places))
        out = torch.empty_like(query)
        add(which, OURS, places, partial(prompt.attend, query, positions, out))
        some = torch.randperm(len(places), device=prompt.device)[:CHECKED_ROWS].sort().values
        error = (out[some].float() - prompt.truth(query[some], positions[some])).abs().max()
        worst = max(worst, float(error))
        try:
            add(which, SEQUENCES, places, prompt.sequences(query, places))
        except ImportError:
            print("vLLM's FlashAttention is not installed: left out")
    places = torch.arange(tokens)
    with suppress(ImportError):
        add("all", PREFILL, places, prompt.sequences(prompt.query(tokens), places))
    return rows, worst


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows")
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of prompts")
    parser.add_argument("--share", type=float, default=0.15, help="of positions")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("it measures a GPU's kernels, and there is no GPU")
    torch.manual_seed(0)
    rows, bars = [], []
    for tokens in args.tokens:
        found, worst = measure(tokens, args.share)
        rows += found
        ms = {(row["positions"], row["by"]): float(str(row["ms"])) for row in found}
        ratio = ms[ALONE, OURS] / ms[RUNS, OURS]
        bars.append(Bar(f"{tokens} tokens: {ALONE} / {RUNS}", ratio, 1.3, "<="))
        bars.append(Bar(f"{tokens} tokens: largest error", worst, CLOSE, "<="))
    report("attention of recomputed rows, one layer", rows, bars, args)


if __name__ == "__main__":
    main()
