"""Time to the first token, cold and from every tier, before and after the engine is killed.

``python -m benchmarks.restart [--json] [--check] [--quick] [--runs 5] [--peer lmcache]``

Real vLLM on the CPU, a small model with random weights, prompts of 3,000 tokens of real text.  Each
prompt is asked cold in a plain engine, which gives the true answer; then, in an engine with the
store, bypassing it, as a miss (with saving), from vLLM's own prefix cache, and from the memory
tier.  Then SIGKILL, a new engine, and the first request of each prompt from memory; SIGKILL, the
memory tier emptied, a new engine, and the first request of each prompt from disk: half of them
with the slot file in the page cache, half without.  With ``--peer lmcache`` the same prompts go to
LMCache: cold, from its memory, and from its disk after its server and engine were killed.

What must hold: all answers are those of the plain engine.  Attention in float32 depends, in its
last bits, on where a prompt is cut into steps, so a step here is as long as what a hit covers: 46
chunks of 64 tokens, and the last 56 tokens are always a step of their own.

Owns a store folder under the temporary directory and one engine at a time; both go at the end,
and an engine also when this process is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import Answer, Engine
from benchmarks.engine_process import connector_config
from benchmarks.lmcache_peer import PEERS, lmcache_engine
from benchmarks.model import demo_text, make_model, tokenize
from benchmarks.store_peers import drop_page_cache
from benchmarks.table import Bar, add_arguments, report, spread
from prefixstore import Store, admin

CHUNK_TOKENS = 64
CHUNKS = 46
STEP_TOKENS = CHUNKS * CHUNK_TOKENS
PROMPT_TOKENS = 3000
ANSWER_TOKENS = 8
PROMPT_STRIDE = 61  # prompts start at different tokens of the text, so they share no chunk
WARM_PROMPTS = 3
DEADLINE_S = 60.0
POLL_S = 0.02
STORE_WAIT_S = 2.0  # LMCache stores asynchronously, and nothing tells when that has ended
REST_S = 0.2  # for what a request leaves behind and no counter shows

NEVER = {"prefixstore": {"read": False, "write": False}}
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "block_size": CHUNK_TOKENS,
    "max_model_len": STEP_TOKENS + 2 * CHUNK_TOKENS,
    "max_num_batched_tokens": STEP_TOKENS,
    "enable_chunked_prefill": True,
    "max_num_seqs": 4,
    "kv_cache_gib": 1.0,
}

COLD = "cold, plain engine"
OWN_PLAIN = "vLLM's own prefix cache, plain engine"
BYPASS = "cold, store bypassed"
MISS = "cold, miss and save"
OWN = "vLLM's own prefix cache, with the store"
MEMORY = "memory tier"
MEMORY_KILLED = "memory tier, after kill -9 and restart"
BYPASS_KILLED = "cold, store bypassed, after restart"
DISK_KILLED = "disk tier, after kill -9 and restart"
DISK_COLD = "disk tier, the same, page cache empty"
PEER = {
    "cold": "LMCache: cold, miss and save",
    "memory": "LMCache: memory (L1)",
    "disk": "LMCache: disk (L2 fs), after kill -9 and restart",
}
CASES = [COLD, OWN_PLAIN, BYPASS, MISS, OWN, MEMORY, MEMORY_KILLED, BYPASS_KILLED,
         DISK_KILLED, DISK_COLD, *PEER.values()]  # fmt: skip

Prompt = list[int]
Row = dict[str, object]


class Results:
    """The answers of every case, compared with the first to each prompt as they come in; times are
    compared with those of the first of the ``cases``."""

    def __init__(self, cases: Sequence[str] = CASES) -> None:
        self._cases = cases
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        self.truth: dict[int, list[int]] = {}  # by the prompt's number
        self.differing: dict[str, int] = defaultdict(int)

    def add(self, case: str, number: int, answer: Answer) -> None:
        """Take in one answer."""
        true = self.truth.setdefault(number, answer.token_ids)
        self.answers[case].append(answer)
        self.differing[case] += answer.token_ids != true

    def median(self, case: str) -> float | None:
        """Median TTFT of a case, in ms; None if it was not measured."""
        values = [entry.ttft_ms for entry in self.answers[case] if entry.ttft_ms is not None]
        return spread(values)["median"] if values else None

    def rows(self) -> list[Row]:
        """One line a case, in a fixed order."""
        return [self._row(case) for case in self._cases if self.answers[case]]

    def _row(self, case: str) -> Row:
        answers = self.answers[case]
        ttft = spread([entry.ttft_ms for entry in answers if entry.ttft_ms is not None])
        cold = self.median(self._cases[0])
        return {
            "case": case,
            "ttft_ms": ttft["median"],
            "min": ttft["min"],
            "max": ttft["max"],
            "n": int(ttft["n"]),
            "of_cold": ttft["median"] / cold if cold else None,
            "answer_ms": spread([entry.total_ms for entry in answers])["median"],
            "cached_tokens": min(entry.cached_tokens or 0 for entry in answers),
            "other_tokens": self.differing[case],
        }


class Bench:
    """One run: the prompts, the store and the results; one engine at a time."""

    def __init__(self, folder: Path, model: Path, text: str, prompts: int) -> None:
        tokens = tokenize(model, text)
        self.folder, self.model, self.results = folder, model, Results()
        every = [_prompt(tokens, number) for number in range(2 * WARM_PROMPTS + prompts)]
        self.warm, self.prompts = every[: 2 * WARM_PROMPTS], every[2 * WARM_PROMPTS :]

    @contextlib.contextmanager
    def engine(self, name: str, *, with_store: bool) -> Iterator[Engine]:
        """An engine whose kernels are warm; it ends by SIGKILL."""
        print(f"engine {name} ...", file=sys.stderr, flush=True)
        extra: dict[str, Any] = {}
        if with_store:
            extra["kv_transfer_config"] = connector_config(
                self.folder / "store", chunk_tokens=CHUNK_TOKENS
            )
        log = self.folder / f"engine-{name}.log"
        engine = Engine(self.model, enable_prefix_caching=True, log=log, **ENGINE, **extra)
        try:
            for prompt in self.warm[:WARM_PROMPTS]:
                self._ask(engine, prompt, NEVER if with_store else None)
            yield engine
        finally:
            engine.kill()

    def plain(self) -> None:
        """The truth, and what vLLM does by itself."""
        with self.engine("plain", with_store=False) as engine:
            for number, prompt in enumerate(self.prompts):
                for case in (COLD, OWN_PLAIN):
                    self.results.add(case, number, self._ask(engine, prompt))

    def first(self, store: Store) -> None:
        """Misses, in turn with requests that bypass the store; then hits."""
        with self.engine("first", with_store=True) as engine:
            for number, prompt in enumerate(self.prompts):
                for case in (BYPASS, MISS) if number % 2 else (MISS, BYPASS):
                    params = NEVER if case == BYPASS else None
                    self.results.add(case, number, self._ask(engine, prompt, params))
                    saved = number + (case == MISS or number % 2 == 0)
                    _wait_for_disk(store, saved * CHUNKS)
                    if case == (BYPASS if number % 2 else MISS):
                        forget(engine)
                for case in (OWN, MEMORY):
                    self.results.add(case, number, self._ask(engine, prompt))
                    forget(engine)
                    time.sleep(REST_S)

    def again(self, store: Store, name: str, cases: Sequence[str], bypass: str | None) -> None:
        """A new engine's first request of every prompt; ``cases`` share them out in turn."""
        with self.engine(name, with_store=True) as engine:
            for number, prompt in enumerate(self.prompts):
                if bypass is not None:
                    self.results.add(bypass, number, self._ask(engine, prompt, NEVER))
                    forget(engine)
                case = cases[number % len(cases)]
                if case == DISK_COLD:
                    drop_page_cache(store.folder.glob("*.slots"))
                self.results.add(case, number, self._ask(engine, prompt))
                time.sleep(REST_S)

    def peer(self) -> None:
        """The same prompts with LMCache: one engine, and another after both were killed."""
        l2 = json.dumps({"type": "fs", "base_path": str(self.folder / "lmcache-l2")})
        options = ("--l1-size-gb", "1", "--l2-adapter", l2)
        for turn, names in enumerate((("cold", "memory"), ("disk",))):
            print("LMCache ...", file=sys.stderr, flush=True)
            with lmcache_engine(
                self.model, self.folder, *options, enable_prefix_caching=False, **ENGINE
            ) as engine:
                for prompt in self.warm[turn * WARM_PROMPTS :][:WARM_PROMPTS]:
                    for _ in range(2):
                        self._ask(engine, prompt)
                        time.sleep(STORE_WAIT_S)
                for number, prompt in enumerate(self.prompts):
                    for name in names:
                        self.results.add(PEER[name], number, self._ask(engine, prompt))
                        time.sleep(STORE_WAIT_S)

    @staticmethod
    def _ask(engine: Engine, prompt: Prompt, params: dict[str, Any] | None = None) -> Answer:
        [answer] = engine.generate(
            [prompt], max_tokens=ANSWER_TOKENS, kv_transfer_params=[params], timeout_s=DEADLINE_S
        )
        return answer


def _prompt(tokens: list[int], number: int) -> Prompt:
    start = number * PROMPT_STRIDE % len(tokens)
    return (tokens[start:] + tokens * (1 + PROMPT_TOKENS // len(tokens)))[:PROMPT_TOKENS]


def forget(engine: Engine) -> None:
    """Have vLLM drop its own prefix cache. Raises RuntimeError if it keeps on refusing.

    It refuses while blocks are in use, as by a connector that still saves them.
    """
    deadline = time.monotonic() + DEADLINE_S
    while not engine.reset_prefix_cache():
        if time.monotonic() > deadline:
            raise RuntimeError("vLLM refused to drop its prefix cache; blocks are still in use")
        time.sleep(POLL_S)


def _wait_for_disk(store: Store, chunks: int) -> None:
    """Until that many chunks are durable, so that no save disturbs the next request."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := admin.stats(store))["tiers"]["disk"]["chunks"] < chunks:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not {chunks} chunks on disk after {DEADLINE_S:g} s: {found}")
        time.sleep(POLL_S)
    time.sleep(REST_S)


def _empty(store: Store) -> None:
    admin.empty_memory(store, DEADLINE_S)
    left = admin.stats(store)["tiers"]["memory"]["chunks"]
    if left:
        raise RuntimeError(f"{left} chunks stayed in the memory tier; nothing should hold them")


def measure(runs: int, peer: str | None) -> Results:
    """All engines, one after the other.  ``runs`` prompts for each half of the disk tier."""
    text = demo_text()
    model = make_model(None, text=text, layers=4, hidden=256)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefixstore-bench-")))
        bench = Bench(folder, model, text, prompts=2 * runs)
        bench.plain()
        store = stack.enter_context(
            Store.open(folder / "store", memory_bytes="2GiB", disk_bytes="4GiB")
        )
        stack.callback(shutil.rmtree, store.live_dir, ignore_errors=True)
        bench.first(store)
        bench.again(store, "after-kill", [MEMORY_KILLED], None)
        _empty(store)
        bench.again(store, "after-kill-memory-emptied", [DISK_KILLED, DISK_COLD], BYPASS_KILLED)
        if peer == "lmcache":
            bench.peer()
        return bench.results


def bars(results: Results, peer: str | None) -> list[Bar]:
    """What must be reached, all of it in one run."""

    def ratio(case: str, other: str) -> float | None:
        top, bottom = results.median(case), results.median(other)
        return None if top is None or not bottom else top / bottom

    ours = [case for case in CASES if case not in PEER.values()]
    miss = ratio(MISS, BYPASS)
    made = [
        Bar("memory tier / cold", ratio(MEMORY, COLD), 0.20, "<="),
        Bar("disk tier after restart / cold", ratio(DISK_KILLED, COLD), 0.25, "<="),
        Bar("a miss, over cold", None if miss is None else miss - 1, 0.03, "<="),
        Bar("answers that differ", sum(results.differing[case] for case in ours), 0, "=="),
    ]
    if peer == "lmcache":
        made.append(Bar("memory tier / LMCache", ratio(MEMORY, PEER["memory"]), 1.0, "<"))
        made.append(Bar("disk tier / LMCache", ratio(DISK_KILLED, PEER["disk"]), 1.0, "<"))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its bars mean nothing")
    parser.add_argument("--runs", type=int, default=5, help="samples of the rarest case")
    parser.add_argument("--peer", choices=PEERS, help="measure this one too (installs it)")
    args = parser.parse_args(argv)
    results = measure(1 if args.quick else args.runs, args.peer)
    title = f"restart: {PROMPT_TOKENS} tokens, ms to the first token"
    report(title, results.rows(), [] if args.quick else bars(results, args.peer), args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
