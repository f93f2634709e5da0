"""What saving costs: tokens a second of loads that store everything, beside the same not stored.

``python -m benchmarks.saving [--json] [--check] [--quick] [--model DIR] [--rounds 5]
[--cuda-graphs]``

Real vLLM on whatever it runs on, one engine, prompts never asked before. A batch that is stored and
one that is not (``"write": false``) take turns, so that the machine's moods hit both; the order
within a pair changes. Two loads: *prefill* (long prompts, one token each) and *decode* (short ones,
many tokens each). ``--model`` as for `benchmarks.prefix`.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import Engine
from benchmarks.engine_model import add_codec, add_graphs, chosen_model, graphs, store_folder
from benchmarks.engine_process import connector_config
from benchmarks.table import Bar, add_arguments, report, spread, told_so_far

VOCAB, DEADLINE_S, REST_S = 1000, 300.0, 1.0
LOST_MAX = 0.02
DROPPED = "prefixstore:save_dropped_chunks_total"


@dataclass(frozen=True)
class Load:
    """One batch."""

    name: str
    prompts: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """All that is computed."""
        return self.prompts * (self.prompt_tokens + self.answer_tokens)


def loads(long: bool, quick: bool) -> list[Load]:
    """For a model of billions of parameters, or a small one on a CPU."""
    if quick:
        return [Load("prefill", 2, 512, 1), Load("decode", 2, 64, 8)]
    if long:
        return [Load("prefill", 16, 8192, 1), Load("decode", 64, 512, 256)]
    return [Load("prefill", 4, 2048, 1), Load("decode", 8, 128, 64)]


def seconds(engine: Engine, load: Load, chosen: random.Random, *, write: bool) -> float:
    """Of one batch, from asking to the last token."""
    prompts: list[str | list[int]] = [
        chosen.choices(range(1, VOCAB), k=load.prompt_tokens) for _ in range(load.prompts)
    ]
    params = [{"prefixstore": {"read": False, "write": write}} for _ in prompts]
    began = time.perf_counter()
    engine.generate(
        prompts, max_tokens=load.answer_tokens, kv_transfer_params=params, timeout_s=DEADLINE_S
    )
    took = time.perf_counter() - began
    engine.settle()
    time.sleep(REST_S)  # what is staged is stored: no batch pays for another's
    return took


def measure(engine: Engine, load: Load, rounds: int) -> dict[str, Any]:
    """Pairs of batches, and the ratio within each."""
    chosen = random.Random(load.name)
    pairs = []
    for number in range(rounds + 1):
        print(f"{load.name}: pair {number} of {rounds} ...", file=sys.stderr, flush=True)
        before = engine.metrics(DROPPED).get(DROPPED, 0.0)
        order = (True, False) if number % 2 else (False, True)
        took = {write: seconds(engine, load, chosen, write=write) for write in order}
        dropped = engine.metrics(DROPPED).get(DROPPED, 0.0) - before
        if number:  # the first one warms what it needs
            pairs.append((took[False], took[True], dropped))
    ratios = spread([plain / stored for plain, stored, _ in pairs])
    return {
        "load": f"{load.name}: {load.prompts} x ({load.prompt_tokens} + {load.answer_tokens})",
        "plain_tok_s": load.tokens / statistics.median(plain for plain, _, _ in pairs),
        "saving_tok_s": load.tokens / statistics.median(stored for _, stored, _ in pairs),
        "ratio": ratios["median"],
        "min": ratios["min"],
        "max": ratios["max"],
        "pairs": len(pairs),
        "dropped_chunks": statistics.median(dropped for _, _, dropped in pairs),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its bars mean nothing")
    parser.add_argument("--model", type=Path, help="a folder; without one a small model is made")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of batches")
    parser.add_argument("--store-gib", type=int, default=2, help="size of the memory tier")
    add_graphs(parser)
    add_codec(parser)
    args = parser.parse_args(argv)
    model, given = chosen_model(args.model, 1.0, 40.0)
    chosen = loads(args.model is not None, args.quick)
    rounds = 1 if args.quick else args.rounds
    longest = max(load.prompt_tokens + load.answer_tokens for load in chosen)
    rows: list[dict[str, Any]] = []
    with told_so_far("What saving costs", lambda: rows), ExitStack() as stack:
        config = connector_config(
            stack.enter_context(store_folder()), memory=args.store_gib << 30, disk=0,
            stall_ms=5000, codec=args.codec,
        )  # fmt: skip
        engine = stack.enter_context(
            Engine(
                model, kv_transfer_config=config, max_num_batched_tokens=8192,
                max_model_len=longest, max_num_seqs=64, **graphs(args), **given,
            )
        )  # fmt: skip
        for load in chosen:
            rows.append(measure(engine, load, rounds))
    bars = [
        Bar(f"{load.name}: tokens/s, saving / not", row["ratio"], 1 - LOST_MAX, ">=")
        for load, row in zip(chosen, rows, strict=True)
    ]
    report("What saving costs", rows, [] if args.quick else bars, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
