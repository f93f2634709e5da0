"""Time to the first token of a prompt made of stored documents in an order never seen.

``python -m benchmarks.blend [--json] [--check] [--quick] [--runs 7] [--budgets .2] [--device-gib 1]
[--model DIR --documents 64 --document-tokens 512 --step-rows 2048 --store-gib 16]``

Real vLLM on whatever it runs on, a small model with random weights, 8 documents of 512 tokens of
real text; ``--model`` may be a folder with nothing but a config.json, which gives a model of that
shape with random weights, and documents of random tokens.  Each was stored behind one system
prompt; each prompt has another, new system prompt, the documents in another random order, and a
question.  Asked are, in turn: cold (the store bypassed), blended at each budget (the share of the
reused tokens' work that is spent), blended with every token recomputed (what a choice saves),
position only, and, with the small model, the exact prefix, for which the documents of that very
prompt were stored just before.  With ``--device-gib`` a second engine, over the same store and with
a device tier, is asked for blends as well, once it has loaded each document three times.

What must hold: with every token recomputed the answer is the cold one.  Weights are random, so the
answers of the others mean nothing: `benchmarks.quality` is about those.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import Answer, Engine
from benchmarks.engine_model import add_codec, add_graphs, graphs
from benchmarks.engine_process import connector_config
from benchmarks.model import demo_text, make_model, tokenize
from benchmarks.table import Bar, add_arguments, report, spread, told_so_far
from prefixstore import Store, admin
from prefixstore.codec import NONE

CHUNK_TOKENS = 64
SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 48, 40, 4
BUDGET = 0.2
VOCAB = 1000  # of random tokens
STEP_TOKENS = 8192  # computed by the engine at once, at most
DEADLINE_S, REST_S = 60.0, 0.2
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "block_size": CHUNK_TOKENS,
    "max_num_seqs": 4,
    "kv_cache_gib": 1.0,
    "enable_prefix_caching": False,
}

COLD = "cold, store bypassed"
ALL = "blended, every token recomputed"
POSITION = "position only"
EXACT = "exact prefix"
ON_DEVICE = ", device tier"
TIMES_LOADED = 3  # before the documents are where they stay
Row = dict[str, object]


def options(**given: Any) -> dict[str, Any]:
    """``kv_transfer_params`` of a request."""
    return {"prefixstore": given}


def blended(budget: float) -> str:
    """The name of a case."""
    return f"blended at {100 * budget:.0f} %"


def params_of(budgets: Sequence[float], *, exact: bool) -> dict[str, dict[str, Any]]:
    """What is asked of the store in each case."""
    params = {COLD: options(read=False, write=False)}
    for budget in budgets:
        params[blended(budget)] = options(write=False, blend={"budget": budget})
    params[ALL] = options(write=False, blend={"selector": "all", "budget": 1.0})
    params[POSITION] = options(write=False, blend={"selector": "none", "budget": 0.0})
    if exact:
        params[EXACT] = options(write=False, blend=False)
    return params


class Bench:
    """One run over one engine. ``tokens``: of real text; without them they are random."""

    def __init__(
        self, engine: Engine, store: Store, tokens: list[int], args: argparse.Namespace
    ) -> None:
        self._engine, self._store, self._tokens = engine, store, tokens
        self._random = random.Random(0)
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        self.params = params_of(args.budgets, exact=bool(tokens))
        self._asked = list(self.params)
        self._before: dict[str, float] = {}
        self.share = 0.0  # of what the second engine loaded, from the device tier
        self._documents = [self._text(args.document_tokens) for _ in range(args.documents)]

    def _text(self, count: int) -> list[int]:
        if not self._tokens:
            return self._random.choices(range(1, VOCAB), k=count)
        at = self._random.randrange(len(self._tokens) - count)
        return self._tokens[at : at + count]

    def go_on(self, engine: Engine) -> None:
        """With an engine that has a device tier, which gets the documents first."""
        reused = [case for case in self.params if case not in (COLD, ALL, EXACT)]
        added = {case + ON_DEVICE: self.params[case] for case in reused}
        self._engine, self._asked = engine, list(added)
        self.params |= added
        for _ in range(TIMES_LOADED):
            self.round(kept=False)
        self._before = self._loaded()

    def _loaded(self) -> dict[str, float]:
        return self._engine.metrics("prefixstore:bytes_loaded_total")

    def from_device(self) -> float:
        """The share of what the last engine loaded since then."""
        found = {name: value - self._before[name] for name, value in self._loaded().items()}
        ours = sum(value for name, value in found.items() if 'tier="device"' in name)
        return ours / max(sum(found.values()), 1.0)

    def warm(self) -> None:
        """Store the documents, each behind the same system prompt."""
        system = self._text(CHUNK_TOKENS)
        for document in self._documents:
            self._ask(system + document, options(read=False))
        self._wait()

    def rounds(self, count: int) -> None:
        """New prompts, whose answers are kept."""
        for number in range(count):
            print(f"prompt {number + 1} of {count} ...", file=sys.stderr, flush=True)
            self.round(kept=True)

    def round(self, *, kept: bool) -> None:
        """One new prompt, asked in every way; the order of the ways rotates by chance."""
        order = self._random.sample(self._documents, len(self._documents))
        prompt = [*self._text(SYSTEM_TOKENS), *(t for d in order for t in d)]
        prompt += self._text(QUESTION_TOKENS)
        cases = [case for case in self._asked if case != EXACT]
        for case in self._random.sample(cases, len(cases)):
            answer = self._ask(prompt, self.params[case])
            if kept:
                self.answers[case].append(answer)
        if EXACT not in self._asked:
            return
        self._ask(prompt, options(read=False, tag="exact"))
        self._wait()
        answer = self._ask(prompt, self.params[EXACT])
        if kept:
            self.answers[EXACT].append(answer)
        admin.remove(self._store, admin.Selection(tag=b"exact"))

    def _ask(self, prompt: list[int], params: dict[str, Any]) -> Answer:
        [answer] = self._engine.generate(
            [prompt], max_tokens=ANSWER_TOKENS, kv_transfer_params=[params], timeout_s=DEADLINE_S
        )
        return answer

    def _wait(self) -> None:
        """Until the store is at rest, so that no save disturbs the next request."""
        deadline, before = time.monotonic() + DEADLINE_S, None
        while True:
            tiers = admin.stats(self._store)["tiers"]
            now = tiers["memory"]["chunks"], tiers["disk"]["chunks"]
            if now == before and (now[0] == now[1] or not self._store.settings.disk_bytes):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"the store did not come to rest: {tiers}")
            before = now
            time.sleep(REST_S)

    def differing(self) -> int:
        """Prompts whose answer, with every token recomputed, is not the cold one."""
        pairs = zip(self.answers[COLD], self.answers[ALL], strict=True)
        return sum(one.token_ids != other.token_ids for one, other in pairs)

    def rows(self) -> list[Row]:
        """One line a case that was asked."""
        asked = [case for case in self.params if self.answers[case]]
        cold = self.ttft(COLD)["median"] if asked else 0.0
        return [
            {
                "case": case, "ttft_ms": found["median"], "min": found["min"], "max": found["max"],
                "n": int(found["n"]), "of_cold": found["median"] / cold,
                "cached_tokens": min(answer.cached_tokens or 0 for answer in self.answers[case]),
            }
            for case in asked
            for found in [self.ttft(case)]
        ]  # fmt: skip

    def ttft(self, case: str) -> dict[str, float]:
        """Median and spread, in ms."""
        return spread([a.ttft_ms for a in self.answers[case] if a.ttft_ms is not None])


def measure(args: argparse.Namespace) -> Bench:
    """One engine, one store."""
    length = args.documents * args.document_tokens + SYSTEM_TOKENS + QUESTION_TOKENS
    given: dict[str, Any] = {
        "max_model_len": length + 1024, "max_num_batched_tokens": min(length + 1024, STEP_TOKENS),
        **ENGINE,
    }  # fmt: skip
    text = ""
    if args.model is None:
        text = demo_text()
        args.model = make_model(None, text=text, layers=4, hidden=256)
    else:
        given |= {
            "load_format": "dummy", "skip_tokenizer_init": True, "kv_cache_gib": 24.0,
            "dtype": "bfloat16",
        }  # fmt: skip
    given |= graphs(args)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefixstore-bench-")))
        store = stack.enter_context(
            Store.open(
                folder / "store", memory_bytes=args.store_gib << 30,
                disk_bytes=2 * args.store_gib << 30 if text else 0,
            )
        )  # fmt: skip
        stack.callback(shutil.rmtree, store.live_dir, ignore_errors=True)
        extra = {
            "blend": {"step_rows": args.step_rows}, "load": "auto" if text else "always",
            "codec": args.codec,
        }  # fmt: skip

        def begin(**more: Any) -> Engine:
            print("engine ...", file=sys.stderr, flush=True)
            transfer = connector_config(
                folder / "store", chunk_tokens=CHUNK_TOKENS, **extra, **more
            )  # fmt: skip
            return Engine(args.model, log=folder / "log", kv_transfer_config=transfer, **given)

        with begin() as engine:
            bench = Bench(engine, store, tokenize(args.model, text) if text else [], args)
            stack.enter_context(told_so_far("blend", bench.rows))
            bench.warm()
            bench.round(kept=False)
            bench.rounds(args.runs)
        if args.device_gib:
            with begin(device=args.device_gib << 30) as engine:
                bench.go_on(engine)
                bench.rounds(args.runs)
                bench.share = bench.from_device()
        return bench


def bars(bench: Bench, args: argparse.Namespace) -> list[Bar]:
    """What must be reached."""
    cold, found = bench.ttft(COLD)["median"], []
    for case in bench.params:
        if case.startswith(tuple(map(blended, args.budgets))):
            found.append(Bar(f"{case} / cold", bench.ttft(case)["median"] / cold, 0.5, "<="))
    if args.device_gib:
        found.append(Bar("bytes from the device tier", bench.share, 0.9, ">="))
    if args.codec != NONE:
        return found
    differing = bench.differing()
    return [*found, Bar("answers that differ with every token recomputed", differing, 0, "==")]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blend")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its bars mean nothing")
    parser.add_argument("--runs", type=int, default=7, help="prompts")
    parser.add_argument("--budgets", type=float, nargs="+", default=[BUDGET], help="shares")
    parser.add_argument("--model", type=Path, help="a folder; without one a small model is made")
    parser.add_argument("--documents", type=int, default=8, help="in each prompt")
    parser.add_argument("--document-tokens", type=int, default=512, help="of each")
    parser.add_argument("--step-rows", type=int, default=2048, help="recomputed in one engine step")
    parser.add_argument("--store-gib", type=int, default=2, help="size of the memory tier")
    parser.add_argument("--device-gib", type=int, default=0, help="size of a device tier")
    add_graphs(parser)
    add_codec(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.runs = 1
    bench = measure(args)
    title = (
        f"blend: {args.documents} documents of {args.document_tokens} tokens, ms to the first token"
    )
    report(title, bench.rows(), [] if args.quick else bars(bench, args), args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
