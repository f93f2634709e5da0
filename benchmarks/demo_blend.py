"""The demo's second act: documents warmed offline, then used in an order never seen.

Two scenes, each with `prefixstore warm` and then a real vLLM engine that blends. Real documents,
for the time it saves (the demo's model has random weights: its answers mean nothing). And facts
spread over chunks (CS-MQAR, `benchmarks.quality`) for the answers: a trained model reads whose
fact it is in the chunk before, so reuse that only moves positions must fail.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import Answer, Engine
from benchmarks.engine_process import connector_config
from benchmarks.model import REPO_ROOT, tokenize
from benchmarks.quality import csmqar
from benchmarks.quality.words import in_words
from benchmarks.table import print_table
from prefixstore import StoreError

CHUNK_TOKENS = 64
MODEL_TOKENS = 4096
BUDGET = 0.2
TIMES = 3  # each way is asked; the median counts
WARM_DEADLINE_S = 300.0
PAGES = ("README", "docs/operations", "docs/format", "docs/decisions", "docs/quality")
PAGE_CHARS = 2_400  # of each: some 750 tokens
OLD_SYSTEM = "You are a helpful assistant of the operators of this store.\n"
NEW_SYSTEM = "Answer in one sentence, and name the document it is from.\n"
QUESTION = "\nWhat happens to a chunk whose bytes were damaged on the disk?\n"
TRAINED = REPO_ROOT / "models" / "csmqar-5m"
FACTS = csmqar.Spec(family="B", chunks=8)
STORIES = 3  # prompts whose chunks are warmed; the first is asked about
QUERIES = 16
WAYS: dict[str, dict[str, Any]] = {
    "cold": {"read": False, "write": False},
    "position only": {"write": False, "blend": {"selector": "none", "budget": 0.0}},
    f"blended at {100 * BUDGET:.0f} %": {"write": False, "blend": {"budget": BUDGET}},
}
COLD, POSITION, BLENDED = WAYS
_COUNTERS = ("tokens_hit", "blend_reused_tokens", "blend_recomputed_tokens")


@dataclass(frozen=True)
class Asked:
    """One prompt, asked in one way; token counts are of one time."""

    answer: Answer
    ttft_ms: float
    exact: int  # tokens of the prompt's own prefix that the store had
    reused: int
    recomputed: int


class SecondAct:
    """``folder`` is for its stores, ``log`` the file engines print to."""

    def __init__(self, folder: Path, model: Path, log: Path) -> None:
        self._folder, self._model, self._log = folder, model, log

    def run(self) -> bool:
        """Both scenes; whether all came out as it must."""
        print("2. Documents warmed offline, used in an order never seen\n")
        return self._documents() and self._facts()

    # ------------------------------------------------------------------ real documents
    def _documents(self) -> bool:
        store, pages = self._folder / "documents", self._folder / "pages"
        texts = {}
        for name in PAGES:
            text = (REPO_ROOT / f"{name}.md").read_text(encoding="utf-8")[:PAGE_CHARS]
            page = pages / f"{Path(name).name}.md"
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
            texts[name] = text
        preamble = self._folder / "preamble.txt"
        preamble.write_text(OLD_SYSTEM, encoding="utf-8")
        say(f"Warming {len(PAGES)} documents, the first page of each, without a server:")
        for line in self._warm(store, self._model, pages.name, "--preamble", preamble.name):
            print(f"    {line}", flush=True)
        parts = [NEW_SYSTEM, *(texts[PAGES[i]] for i in (3, 0, 2)), QUESTION]
        prompt = [token for part in parts for token in tokenize(self._model, part)]
        say(f"A question uses three of them, in another order, behind another system prompt: "
            f"{len(prompt)} tokens.")  # fmt: skip
        with self._engine(store, self._model) as engine:
            self._ask(engine, prompt[1:], BLENDED, 1)  # so that nothing is done for the first time
            asked = {way: self._ask(engine, prompt, way, TIMES) for way in WAYS}
        rows = [
            [way, one.ttft_ms, one.exact + one.reused - one.recomputed, one.recomputed,
             len(prompt) - one.exact - one.reused]
            for way, one in asked.items()
        ]  # fmt: skip
        print()
        print_table(
            f"Three warmed documents in a new order, medians of {TIMES}",
            ["step", "TTFT ms", "tokens reused", "recomputed", "new"],
            rows,
        )
        print()
        say("(This model's weights are random, so only the times mean something.)")
        found = asked[BLENDED].reused > 0.9 * sum(len(tokenize(self._model, p)) for p in parts[1:4])
        return expect(found, "the warmed documents were not found in the prompt")

    # ------------------------------------------------------------------ facts
    def _facts(self) -> bool:
        batch = csmqar.make_batch(csmqar.held_out_rng(0), STORIES, FACTS, QUERIES)
        store, lines = self._folder / "facts", self._folder / "facts.jsonl"
        size = FACTS.chunk_tokens
        chunks = batch.tokens[:, 1 : FACTS.context_tokens].reshape(-1, size).tolist()
        random.Random(0).shuffle(order := list(range(len(chunks))))
        lines.write_text(
            "".join(json.dumps({"text": in_words(chunks[i]), "name": f"c{i}"}) + "\n"
                    for i in order),
            encoding="utf-8",
        )  # fmt: skip
        say(f"Now answers: models/{TRAINED.name} was trained on facts whose subject is often named "
            "in the chunk before theirs.")  # fmt: skip
        say(f"Warming {len(chunks)} chunks of {size} tokens, those of {STORIES} prompts, shuffled:")
        print(f"    {self._warm(store, TRAINED, lines.name)[-1]}", flush=True)
        context = batch.tokens[0, : FACTS.context_tokens].tolist()
        places = batch.answer_positions[batch.cross[0]].tolist()
        asks = [batch.tokens[0, at - 2 : at + 1].tolist() for at in places]
        answers = [int(batch.tokens[0, at + 1]) for at in places]
        given: dict[str, list[int]] = {}
        with self._engine(store, TRAINED) as engine:
            for way in WAYS:
                given[way] = [
                    self._ask(engine, context + ask, way, 1).answer.token_ids[0] for ask in asks
                ]
        self._show_facts(asks, answers, given)
        right = {way: sum(map(int.__eq__, tokens, answers)) for way, tokens in given.items()}
        counts = ", ".join(f"{way} {count} of {len(answers)}" for way, count in right.items())
        say(f"Right: {counts}.\n")
        return expect(
            right[COLD] == right[BLENDED] == len(answers) > right[POSITION],
            "cold and blended must answer all questions right, and position only must not",
        )

    def _show_facts(
        self, asks: list[list[int]], answers: list[int], given: dict[str, list[int]]
    ) -> None:
        def word(token: int, right: int) -> str:
            return in_words([token]) + ("" if token == right else " (wrong)")

        rows: list[list[object]] = [
            [in_words(ask[1:]), *(word(given[way][i], answers[i]) for way in WAYS)]
            for i, ask in enumerate(asks)
        ]
        print()
        print_table("Questions whose answer hangs on the chunk before", ["question", *WAYS], rows)
        print()

    # ------------------------------------------------------------------ engines
    @contextmanager
    def _engine(self, store: Path, model: Path) -> Iterator[Engine]:
        say("Starting a vLLM engine that blends ...")
        transfer = connector_config(store, chunk_tokens=CHUNK_TOKENS, load="always", blend=True)
        with Engine(
            model, log=self._log, start_timeout_s=300.0, dtype="float32", kv_cache_gib=0.25,
            max_model_len=MODEL_TOKENS, max_num_batched_tokens=MODEL_TOKENS,
            block_size=CHUNK_TOKENS, enable_prefix_caching=False, kv_transfer_config=transfer,
        ) as engine:  # fmt: skip
            yield engine

    def _warm(self, store: Path, model: Path, *arguments: str) -> list[str]:
        """``prefixstore warm``, as a user would run it; its report. Raises StoreError."""
        engine = {
            "dtype": "float32", "max_model_len": MODEL_TOKENS, "block_size": CHUNK_TOKENS,
            "kv_cache_memory_bytes": 1 << 28,
        }  # fmt: skip
        command = [
            str(Path(sys.executable).parent / "prefixstore"), "warm", str(store),
            "--model", str(model), "--memory", "256MiB", "--disk", "512MiB",
            "--engine", json.dumps(engine), *arguments,
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=self._folder, capture_output=True, text=True, timeout=WARM_DEADLINE_S
        )
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no output").splitlines()[-1]
            raise StoreError(f"prefixstore warm ended with {done.returncode}: {reason}")
        return done.stdout.strip().splitlines()

    def _ask(self, engine: Engine, prompt: Sequence[int], way: str, times: int) -> Asked:
        before = counters(engine)
        answers = [
            engine.generate(
                [list(prompt)], max_tokens=1, kv_transfer_params=[{"prefixstore": WAYS[way]}]
            )[0]
            for _ in range(times)
        ]
        engine.settle()
        after = counters(engine)
        exact, reused, recomputed = (int(after[c] - before[c]) // times for c in _COUNTERS)
        ttft = statistics.median(answer.ttft_ms or 0.0 for answer in answers)
        return Asked(answers[0], ttft, exact, reused, recomputed)


def counters(engine: Engine) -> dict[str, float]:
    """The connector's counters of tokens, over all tiers."""
    return {name: sum(engine.metrics(f"prefixstore:{name}_total").values()) for name in _COUNTERS}


def expect(good: bool, otherwise: str) -> bool:
    """Say what went wrong, if it did."""
    if not good:
        print(f"demo: {otherwise}", file=sys.stderr)
    return good


def say(text: str) -> None:
    """One line of what is going on."""
    print(f"- {text}", flush=True)
