"""How much of a full prefill's answers blending keeps, for each selector and charged budget.

``python -m benchmarks.quality [--models FOLDER ...] [--json] [--check] [--quick] [--plot FILE]``

On CS-MQAR prompts (`benchmarks.quality.csmqar`) of held-out seeds, families A, B, C and E, with 4,
8 and 16 chunks.  PGR = (score - reuse) / (full - reuse), the score being the share of right answers
to cross queries, reuse that of position-only reuse.  Budgets are charged as `blend.select` says;
rows marked "choice free" charge nothing for the choice, an upper bound of what a method could do.
KL is of the answer's distribution, full || blended, beside that of a full prefill in bfloat16.  The
slow reference does the blending, in batches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.quality.cases import load, make_case
from benchmarks.quality.csmqar import FAMILIES
from benchmarks.quality.measure import BUDGETS, Rows, bars, measure, noise_row, summary
from benchmarks.quality.plot import plot
from benchmarks.table import add_arguments, report

MODELS = Path(__file__).resolve().parents[2] / "models"
CHUNKS = (4, 8, 16)
QUERIES = 16


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="one small case: does it work?")
    parser.add_argument(
        "--models", nargs="+", type=Path, help="folders; default: the one in models/"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=32, help="prompts in a batch")
    parser.add_argument("--seeds", type=int, default=3, help="batches of each kind")
    parser.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument(
        "--middle",
        action="store_true",
        help="reuse what was encoded in the middle of other prompts, not alone (no bars)",
    )
    parser.add_argument("--plot", type=Path, help="write the curves as SVG")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Rows:
    """All rows."""
    folders = args.models or sorted(path.parent for path in MODELS.glob("*/model.safetensors"))
    if not folders:
        raise SystemExit(f"no model in {MODELS}: train one with python -m benchmarks.quality.train")
    families, chunks, prompts, seeds = FAMILIES, args.chunks, args.prompts, args.seeds
    budgets: Sequence[float] = args.budgets
    if args.quick:
        families, chunks, prompts, seeds, budgets = ("B", "E"), [4], 2, 1, (0.2,)
    rows: Rows = []
    for folder in folders:
        model = load(folder, args.device)
        for count in chunks:
            for family in families:
                print(
                    f"{folder.name}: family {family}, {count} chunks", file=sys.stderr, flush=True
                )
                case = partial(make_case, model, family, count, prompts, alone=not args.middle)
                found = [
                    measure(model, case(seed=seed, queries=QUERIES), budgets)
                    for seed in range(seeds)
                ]
                rows += summary(folder.name, family, count, found)
        rows.append(noise_row(folder, args.device, prompts))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    args = arguments(argv)
    rows = run(args)
    if args.plot:
        plot(rows, args.plot)
    judged = [] if args.quick or args.middle else bars(rows)
    report("quality: CS-MQAR, held-out seeds", rows, judged, args)


if __name__ == "__main__":
    main()
