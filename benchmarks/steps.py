"""What loads cost the requests that decode meanwhile: time of the engine's steps.

``python -m benchmarks.steps [--json] [--check] [--quick] [--model DIR] [--rounds 3]
[--cuda-graphs]``

Real vLLM on whatever it runs on, one engine; ``--model`` as for `benchmarks.prefix`. A batch
decodes; while it does, requests arrive one after the other whose prompts are long prefixes that are
cached, but for a few tokens. In one kind of round vLLM has them in its own prefix cache: nothing is
loaded. In the other that cache is empty, and they are loaded from the store's memory tier. Both
compute the same, in turns. A step's time is that between two tokens of a request that decodes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine import Answer, Engine, Request
from benchmarks.engine_model import add_graphs, chosen_model, graphs, store_folder
from benchmarks.engine_process import connector_config
from benchmarks.prefix import CHUNK_TOKENS
from benchmarks.prefix_bench import ask, store_all
from benchmarks.rag_trace import percentile
from benchmarks.restart import forget
from benchmarks.table import Bar, add_arguments, report, told_so_far

VOCAB, DEADLINE_S = 1000, 300.0
BEHIND_TOKENS = 9  # behind the last chunk of each prefix: less than a block, so never cached
WORSE_MAX = 1.05
ALONE, OWN, LOADED = "nothing arrives", "vLLM's own prefix cache", "loads from the memory tier"


@dataclass(frozen=True)
class Sizes:
    """A batch that decodes, and what arrives meanwhile."""

    decoding: int
    prompt_tokens: int
    answer_tokens: int
    arriving: int
    prefix_tokens: int
    first_step: int  # of the batch, at which the first of them arrives
    every: int  # steps

    @property
    def behind(self) -> int:
        """The step at which all has arrived and is loaded, on any machine that keeps up."""
        return self.first_step + (self.arriving + 1) * self.every


LARGE = Sizes(32, 512, 288, 12, 8192, 32, 20)
SMALL = Sizes(4, 64, 96, 5, 1024, 16, 12)
QUICK = Sizes(2, 32, 24, 2, 128, 8, 5)


@dataclass
class Bench:
    """Prompts, and what was measured of each kind of round."""

    sizes: Sizes
    chosen: random.Random = field(default_factory=lambda: random.Random(5))
    steps_ms: dict[str, list[list[float]]] = field(default_factory=dict)  # a list a round
    ttft_ms: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = self.sizes.prefix_tokens + BEHIND_TOKENS
        self.prefixes = [self._tokens(count) for _ in range(self.sizes.arriving)]

    def _tokens(self, count: int) -> list[int]:
        return self.chosen.choices(range(1, VOCAB), k=count)

    def round(self, engine: Engine, kind: str, *, keep: bool) -> None:
        """One batch, and what arrives meanwhile."""
        forget(engine)
        for prefix in self.prefixes if kind == OWN else ():
            ask(engine, prefix)
        sizes = self.sizes
        apart = {"prefixstore": {"read": False, "write": False}}
        requests = [
            Request(
                self._tokens(sizes.prompt_tokens), sizes.answer_tokens, kv_transfer_params=apart
            )
            for _ in range(sizes.decoding)
        ]
        for number, prefix in enumerate(self.prefixes if kind != ALONE else ()):
            requests.append(
                Request(prefix, 1, arrival_step=sizes.first_step + number * sizes.every)
            )
        answers = engine.submit(requests, timeout_s=DEADLINE_S)
        engine.settle()
        if keep:
            self._keep(kind, answers)

    def _keep(self, kind: str, answers: Sequence[Answer]) -> None:
        sizes = self.sizes
        arrived = answers[sizes.decoding :]
        if any(answer.cached_tokens != sizes.prefix_tokens for answer in arrived):
            raise RuntimeError(f"{kind}: not a whole prefix, and nothing else, was found")
        stamps = answers[0].token_ms
        steps = [after - before for before, after in itertools.pairwise(stamps)]
        self.steps_ms.setdefault(kind, []).append(steps[sizes.first_step : sizes.behind])
        self.ttft_ms.setdefault(kind, []).extend(
            answer.ttft_ms for answer in arrived if answer.ttft_ms is not None
        )

    def rows(self) -> list[dict[str, Any]]:
        """One a kind of round: steps, and the first tokens of what arrived."""
        rows = []
        for kind, rounds in self.steps_ms.items():
            times = [ms for one in rounds for ms in one]
            p99s = [percentile(one, 99) for one in rounds]
            first = self.ttft_ms[kind]
            rows.append({
                "meanwhile": kind, "steps": len(times), "mean_ms": statistics.fmean(times),
                "p50_ms": percentile(times, 50), "p99_ms": percentile(times, 99),
                "p99_least_ms": min(p99s), "p99_most_ms": max(p99s), "most_ms": max(times),
                "ttft_p50_ms": percentile(first, 50) if first else None,
            })  # fmt: skip
        return rows


def measure(bench: Bench, engine: Engine, rounds: int) -> None:
    """Rounds of each kind, in turns; the first ones warm what they need."""
    store_all(engine, bench.prefixes, bench.sizes.prefix_tokens)
    for number in range(rounds + 1):
        print(f"round {number} of {rounds} ...", file=sys.stderr, flush=True)
        kinds = (ALONE, OWN, LOADED) if number % 2 else (LOADED, OWN, ALONE)
        for kind in kinds:
            bench.round(engine, kind, keep=number > 0)


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """What must be reached."""
    by_kind = {row["meanwhile"]: row for row in rows}
    ratio = by_kind[LOADED]["p99_ms"] / by_kind[OWN]["p99_ms"]
    return [Bar("p99 of a step, loads / vLLM's own prefix cache", ratio, WORSE_MAX, "<=")]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its bars mean nothing")
    parser.add_argument("--model", type=Path, help="a folder; without one a small model is made")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind")
    parser.add_argument("--store-gib", type=int, help="size of the memory tier")
    add_graphs(parser)
    args = parser.parse_args(argv)
    model, given = chosen_model(args.model, 0.5, 24.0)
    sizes = QUICK if args.quick else LARGE if args.model is not None else SMALL
    store_gib = args.store_gib or (24 if args.model is not None else 1)
    bench = Bench(sizes)
    with told_so_far("steps", bench.rows), ExitStack() as stack:
        config = connector_config(
            stack.enter_context(store_folder()), memory=store_gib << 30, disk=0, load="always",
            stall_ms=5000, chunk_tokens=CHUNK_TOKENS,
        )  # fmt: skip
        longest = sizes.prefix_tokens + BEHIND_TOKENS + 1
        engine = stack.enter_context(
            Engine(
                model, kv_transfer_config=config, max_num_batched_tokens=8192,
                max_model_len=max(longest, sizes.prompt_tokens + sizes.answer_tokens),
                max_num_seqs=64, enable_prefix_caching=True, **graphs(args), **given,
            )
        )  # fmt: skip
        measure(bench, engine, 1 if args.quick else args.rounds)
    rows = bench.rows()
    title = (
        f"steps of {sizes.decoding} requests that decode, while {sizes.arriving} with prefixes of "
        f"{sizes.prefix_tokens} tokens arrive, one every {sizes.every} steps"
    )
    report(title, rows, [] if args.quick else bars(rows), args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
