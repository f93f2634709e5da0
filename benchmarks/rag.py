"""A RAG-like trace at rising rates: how fast may it come before the first tokens come too late?

``python -m benchmarks.rag [--json] [--quick] [--model DIR] [--variants ...]``

Real vLLM on whatever it runs on; ``--model`` as for `benchmarks.prefix`. The trace is
`benchmarks.rag_trace`'s: documents drawn by Zipf, several in a prompt, in any order, and Poisson
arrivals. An engine for each variant: no cache, vLLM's prefix cache, its OffloadingConnector (on a
GPU), the store's exact prefixes, and blending. The KV cache holds less than the documents, the
memory tier (of the store, or of that connector) all of them; each was stored once, alone behind the
system prompt.

The latency to be kept is ``--slo-factor`` times the median TTFT of requests that are alone in the
engine without a cache, for ``--in-time`` of the requests (.99 of less than 100 are all of them).
TTFT counts from a request's arrival, whatever the engine was doing then. Rates are tried from
``--first-rate`` of what that engine could do at most (1 / that TTFT) up by ``--rate-factor`` until
one is missed, then by bisection; each rate has prompts of its own, the same ones for all variants.
Variants come one after another; on a GPU each rate begins on the core that is the quickest then
(`cores`). First tokens are compared with those of the engine without a cache; with blending they
may differ, and in bfloat16 the others' may where steps are cut elsewhere.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cores import share_quickest
from benchmarks.engine import Answer, Engine, Request
from benchmarks.engine_model import add_graphs, chosen_model, graphs, store_folder
from benchmarks.engine_process import connector_config, native_config
from benchmarks.rag_trace import SYSTEM_TOKENS, Arrival, Trace, highest_rate, percentile
from benchmarks.table import add_arguments, report, told_so_far

NONE, OWN, NATIVE = "no cache", "vLLM prefix caching", "OffloadingConnector"
EXACT, BLEND = "prefixstore, exact", "prefixstore, blend"
VARIANTS = {"none": NONE, "own": OWN, "native": NATIVE, "exact": EXACT, "blend": BLEND}
BLOCK_TOKENS = 64  # so of a chunk, too
ALONE = 8  # requests that are asked alone
ALONE_SEED = 1000  # of a rate: its number
DEADLINE_S, REST_S = 300.0, 1.0
Row = dict[str, object]


class Bench:
    """What was asked of which variant, and what came."""

    def __init__(self, trace: Trace, args: argparse.Namespace) -> None:
        self._trace, self._args = trace, args
        self._truth: dict[tuple[int, ...], int] = {}
        self._rows: dict[str, list[Row]] = {}
        self._best: dict[str, float | None] = {}
        self.alone_ms = self.slo_ms = 0.0

    def run(self, engine: Engine, variant: str) -> None:
        """Everything for one variant; the one without a cache comes first."""
        params = None
        if variant == BLEND:
            params = {"prefixstore": {"blend": {"budget": self._args.budget}}}
        if variant in (NATIVE, EXACT, BLEND):
            self._store_all(engine)
        self._measure_alone(engine, variant, params)
        first = self._args.first_rate * 1000 / self.alone_ms
        grid = [first * self._args.rate_factor**number for number in range(self._args.rates)]
        self._rows[variant] = []
        self._best[variant] = highest_rate(
            grid, self._args.bisections, partial(self._keeps, engine, variant, params)
        )

    def _store_all(self, engine: Engine) -> None:
        """Ask each document alone until it comes from its tier; saves that find no room are
        dropped, so it may take several times."""
        left, end = list(range(len(self._trace.documents))), time.monotonic() + DEADLINE_S
        while left:
            if time.monotonic() > end:
                raise RuntimeError(f"{len(left)} documents were not stored in {DEADLINE_S:g} s")
            engine.reset_prefix_cache()
            left = [number for number in left if not self._is_stored(engine, number)]
            time.sleep(REST_S if left else 0.0)

    def _is_stored(self, engine: Engine, document: int) -> bool:
        [answer] = engine.generate([self._trace.alone(document)], max_tokens=1)
        engine.settle()
        wanted = SYSTEM_TOKENS + len(self._trace.documents[document])
        return (answer.cached_tokens or 0) >= wanted // BLOCK_TOKENS * BLOCK_TOKENS

    def _measure_alone(self, engine: Engine, variant: str, params: dict[str, Any] | None) -> None:
        """Warms what the engine needs; and, without a cache, what the latency is measured by."""
        took = []
        if torch.cuda.is_available():
            share_quickest([engine])
        for number, one in enumerate(self._trace.arrivals(ALONE_SEED, 2 * ALONE, 1.0)):
            [answer] = engine.submit([self._request(Arrival(one.prompt, 0.0), params)])
            engine.settle()
            if number >= ALONE and answer.ttft_ms is not None:
                took.append(answer.ttft_ms)
        if variant == NONE:
            self.alone_ms = percentile(took, 50)
            self.slo_ms = self._args.slo_factor * self.alone_ms

    def _request(self, one: Arrival, params: dict[str, Any] | None) -> Request:
        return Request(
            one.prompt, self._args.answer_tokens, kv_transfer_params=params, arrival_s=one.seconds
        )

    def _keeps(
        self, engine: Engine, variant: str, params: dict[str, Any] | None, number: int, rate: float
    ) -> bool:
        """Replay the trace at one rate; whether first tokens came in time."""
        arrivals = self._trace.arrivals(number, self._args.requests, rate)
        requests = [self._request(one, params) for one in arrivals]
        if torch.cuda.is_available():
            share_quickest([engine])
        answers = engine.submit(requests, timeout_s=DEADLINE_S + arrivals[-1].seconds)
        engine.settle()
        row = self._row(variant, rate, arrivals, answers)
        told = f"{rate:.2f}/s: p50 {row['p50_ms']:.0f} ms, p99 {row['p99_ms']:.0f} ms"
        print(f"{variant}, {told}", file=sys.stderr, flush=True)
        self._rows[variant].append(row)
        return bool(row["in_time"])

    def _row(
        self, variant: str, rate: float, arrivals: list[Arrival], answers: list[Answer]
    ) -> Row:
        times = [answer.ttft_ms for answer in answers if answer.ttft_ms is not None]
        ended = [one.seconds + a.total_ms / 1e3 for one, a in zip(arrivals, answers, strict=True)]
        prompts = [tuple(one.prompt) for one in arrivals]
        firsts = [answer.token_ids[0] for answer in answers]
        if variant == NONE:
            self._truth.update(zip(prompts, firsts, strict=True))
        true = [self._truth.get(prompt) for prompt in prompts]
        prompt_tokens = sum(map(len, prompts))
        latest = percentile(times, 100 * self._args.in_time)
        return {
            "variant": variant, "rate_per_s": rate, "requests": len(answers),
            "p50_ms": percentile(times, 50), "p95_ms": percentile(times, 95),
            "p99_ms": percentile(times, 99), "in_time": latest <= self.slo_ms,
            "done_per_s": len(answers) / max(ended),
            "from_cache": sum(answer.cached_tokens or 0 for answer in answers) / prompt_tokens,
            "compared": sum(one is not None for one in true),
            "other_first": sum(
                one is not None and one != other for one, other in zip(true, firsts, strict=True)
            ),
        }  # fmt: skip

    def rows(self) -> list[Row]:
        """By variant and rate; with each the highest rate that was in time, and that rate over the
        one without a cache."""
        found = []
        base = self._best.get(NONE)
        for variant, rows in self._rows.items():
            best = self._best.get(variant)
            ratio = best / base if best and base else None
            for row in sorted(rows, key=lambda row: float(str(row["rate_per_s"]))):
                found.append({**row, "best_per_s": best, "of_no_cache": ratio})
        return found


def measure(bench: Bench, args: argparse.Namespace, longest: int) -> None:
    """An engine for each variant."""
    model, given = chosen_model(args.model, args.kv_gib, args.kv_gib)
    given |= graphs(args)
    length = longest + args.answer_tokens
    arguments: dict[str, Any] = {
        "block_size": BLOCK_TOKENS, "max_model_len": length, "max_num_seqs": 64,
        "max_num_batched_tokens": min(args.step_tokens, length), **given,
    }  # fmt: skip
    store_bytes = int(args.store_gib * 2**30)
    for name in args.variants:
        variant, began = VARIANTS[name], time.monotonic()
        with ExitStack() as stack:
            arguments.pop("kv_transfer_config", None)
            transfer = None
            if variant == NATIVE:
                transfer = native_config(store_bytes)
            elif variant in (EXACT, BLEND):
                transfer = connector_config(
                    stack.enter_context(store_folder()), memory=store_bytes, disk=0,
                    chunk_tokens=BLOCK_TOKENS, load="always", stall_ms=5000, staging="2GiB",
                    **({"blend": {"step_rows": args.step_rows}} if variant == BLEND else {}),
                )  # fmt: skip
            if transfer is not None:
                arguments["kv_transfer_config"] = transfer
            engine = stack.enter_context(
                Engine(model, enable_prefix_caching=variant != NONE, **arguments)
            )
            bench.run(engine, variant)
        print(f"{variant}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what is not given depends on whether there is a model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rag")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--model", type=Path, help="a folder; without one a small model is made")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="besides none")
    parser.add_argument("--documents", type=int, help="in all")
    parser.add_argument("--document-tokens", type=int, help="of each")
    parser.add_argument("--in-prompt", type=int, nargs=2, default=[4, 8], help="fewest, most")
    parser.add_argument("--zipf", type=float, default=0.9, help="exponent of their popularity")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32, help="at each rate")
    parser.add_argument("--rates", type=int, default=6, help="of the grid, at most")
    parser.add_argument("--first-rate", type=float, default=0.4, help="of 1 / TTFT alone")
    parser.add_argument("--rate-factor", type=float, default=1.6, help="from one to the next")
    parser.add_argument("--bisections", type=int, default=2, help="behind the first that is missed")
    parser.add_argument("--slo-factor", type=float, default=3.0, help="times the TTFT alone")
    parser.add_argument("--in-time", type=float, default=0.99, help="share that must come in time")
    parser.add_argument("--budget", type=float, default=0.15, help="of a blend")
    parser.add_argument("--step-rows", type=int, default=2048, help="of a blend in one step")
    parser.add_argument("--step-tokens", type=int, default=4096, help="computed in one step")
    parser.add_argument("--kv-gib", type=float, help="of the engine's own KV cache")
    parser.add_argument("--store-gib", type=float, help="of the memory tier")
    add_graphs(parser)
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if args.variants is None:
        args.variants = [name for name in VARIANTS if gpu or VARIANTS[name] != NATIVE]
    if "native" in args.variants and not gpu:
        parser.error("--variants native: vLLM's OffloadingConnector needs a GPU; leave it out")
    args.variants = ["none", *(name for name in args.variants if name != "none")]
    sizes = (96, 1024, 8.0, 24.0) if args.model else (48, 256, 0.05, 0.75)
    if args.quick:
        sizes = (6, 128, 0.05, 0.25)
        args.in_prompt, args.requests, args.rates, args.bisections = [2, 3], 4, 2, 0
    names = ("documents", "document_tokens", "kv_gib", "store_gib")
    for name, value in zip(names, sizes, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    args = parse(argv)
    fewest, most = args.in_prompt
    trace = Trace(args.documents, args.document_tokens, args.zipf, fewest, most)
    bench = Bench(trace, args)
    with told_so_far("RAG", bench.rows):
        measure(bench, args, trace.longest)
    title = (
        f"RAG: {args.documents} documents of {args.document_tokens} tokens, {fewest} to {most} in "
        f"a prompt; TTFT alone {bench.alone_ms:.0f} ms, {100 * args.in_time:g} % within "
        f"{bench.slo_ms:.0f} ms"
    )
    report(title, bench.rows(), [], args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
