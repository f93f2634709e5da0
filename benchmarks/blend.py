"""Time to the first token of a prompt made of stored documents in an order never seen.

``python -m benchmarks.blend [--json] [--check] [--quick] [--runs 7]``

Real vLLM on the CPU, a small model with random weights, 8 documents of 512 tokens of real text.
Each was stored behind one system prompt; each prompt has another, new system prompt, the documents
in another random order, and a question.  Asked are, in turn: cold (the store bypassed), blended at
20 % of the reused tokens' work, blended with every token recomputed (what a choice saves), position
only, and the exact prefix, for which the documents of that very prompt were stored just before.

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
from benchmarks.engine_process import connector_config
from benchmarks.model import demo_text, make_model, tokenize
from benchmarks.table import Bar, add_arguments, report, spread
from prefixstore import Store, admin

CHUNK_TOKENS = 64
DOCUMENTS, DOCUMENT_TOKENS = 8, 512
SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 48, 40, 4
BUDGET = 0.2
DEADLINE_S, POLL_S, REST_S = 60.0, 0.02, 0.2
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "block_size": CHUNK_TOKENS,
    "max_model_len": 6144,
    "max_num_batched_tokens": 6144,
    "max_num_seqs": 4,
    "kv_cache_gib": 1.0,
    "enable_prefix_caching": False,
}

COLD = "cold, store bypassed"
BLENDED = f"blended at {100 * BUDGET:.0f} %"
ALL = "blended, every token recomputed"
POSITION = "position only"
EXACT = "exact prefix"
CASES = (COLD, BLENDED, ALL, POSITION, EXACT)
Row = dict[str, object]


def options(**given: Any) -> dict[str, Any]:
    """``kv_transfer_params`` of a request."""
    return {"prefixstore": given}


PARAMS = {
    COLD: options(read=False, write=False),
    BLENDED: options(write=False, blend={"budget": BUDGET}),
    ALL: options(write=False, blend={"selector": "all", "budget": 1.0}),
    POSITION: options(write=False, blend={"selector": "none", "budget": 0.0}),
    EXACT: options(write=False, blend=False),
}


class Bench:
    """One run over one engine."""

    def __init__(self, folder: Path, engine: Engine, store: Store, tokens: list[int]) -> None:
        self._engine, self._store, self._tokens = engine, store, tokens
        self._random = random.Random(0)
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        self._documents = [self._text(DOCUMENT_TOKENS) for _ in range(DOCUMENTS)]

    def _text(self, count: int) -> list[int]:
        at = self._random.randrange(len(self._tokens) - count)
        return self._tokens[at : at + count]

    def warm(self) -> None:
        """Store the documents, each behind the same system prompt."""
        system = self._text(CHUNK_TOKENS)
        for document in self._documents:
            self._ask(system + document, options(read=False))
        self._wait()

    def round(self, *, kept: bool) -> None:
        """One new prompt, asked in every way; the order of the ways rotates by chance."""
        order = self._random.sample(self._documents, DOCUMENTS)
        prompt = [*self._text(SYSTEM_TOKENS), *(t for d in order for t in d)]
        prompt += self._text(QUESTION_TOKENS)
        for case in self._random.sample(CASES[:-1], len(CASES) - 1):
            answer = self._ask(prompt, PARAMS[case])
            if kept:
                self.answers[case].append(answer)
        self._ask(prompt, options(read=False, tag="exact"))
        self._wait()
        answer = self._ask(prompt, PARAMS[EXACT])
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
        deadline, before = time.monotonic() + DEADLINE_S, -1
        while True:
            tiers = admin.stats(self._store)["tiers"]
            now = tiers["disk"]["chunks"] - tiers["memory"]["chunks"]
            if now == before == 0:
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
        """One line a case."""
        cold = self.ttft(COLD)["median"]
        return [
            {
                "case": case, "ttft_ms": found["median"], "min": found["min"], "max": found["max"],
                "n": int(found["n"]), "of_cold": found["median"] / cold,
                "cached_tokens": min(answer.cached_tokens or 0 for answer in self.answers[case]),
            }
            for case in CASES
            for found in [self.ttft(case)]
        ]  # fmt: skip

    def ttft(self, case: str) -> dict[str, float]:
        """Median and spread, in ms."""
        return spread([a.ttft_ms for a in self.answers[case] if a.ttft_ms is not None])


def measure(runs: int) -> Bench:
    """One engine, one store."""
    text = demo_text()
    model = make_model(None, text=text, layers=4, hidden=256)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefixstore-bench-")))
        store = stack.enter_context(
            Store.open(folder / "store", memory_bytes="2GiB", disk_bytes="4GiB")
        )
        stack.callback(shutil.rmtree, store.live_dir, ignore_errors=True)
        transfer = connector_config(folder / "store", chunk_tokens=CHUNK_TOKENS, blend=True)
        print("engine ...", file=sys.stderr, flush=True)
        engine = stack.enter_context(
            Engine(model, log=folder / "engine.log", kv_transfer_config=transfer, **ENGINE)
        )
        bench = Bench(folder, engine, store, tokenize(model, text))
        bench.warm()
        bench.round(kept=False)
        for number in range(runs):
            print(f"prompt {number + 1} of {runs} ...", file=sys.stderr, flush=True)
            bench.round(kept=True)
        return bench


def bars(bench: Bench) -> list[Bar]:
    """What must be reached."""
    ratio = bench.ttft(BLENDED)["median"] / bench.ttft(COLD)["median"]
    return [
        Bar(f"{BLENDED} / cold", ratio, 0.5, "<="),
        Bar("answers that differ with every token recomputed", bench.differing(), 0, "=="),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blend")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its bars mean nothing")
    parser.add_argument("--runs", type=int, default=7, help="prompts")
    args = parser.parse_args(argv)
    bench = measure(1 if args.quick else args.runs)
    title = f"blend: {DOCUMENTS} documents of {DOCUMENT_TOKENS} tokens, ms to the first token"
    report(title, bench.rows(), [] if args.quick else bars(bench), args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
