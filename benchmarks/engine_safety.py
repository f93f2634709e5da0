"""A real vLLM engine under aborts, preemptions and a store that is broken all the time.

``python -m benchmarks.engine_safety [--requests N] [--seed S] [--engines NAME ..]
[--dtype float32] [--json] [--check]``

The requests (`engine_safety_requests`) go to six engines, one after the other, on one store to
which something happens at almost any moment (`engine_safety_faults`):

- ``alone``: one request at a time, in steps of a chunk, so that each answer must be the plain
  engine's to the bit, log probabilities included (but of prompts that are whole chunks: of such a
  hit the last token is computed by itself);
- ``mixed``: batches in a KV cache of KV_TOKENS, which preempts, with vLLM's own prefix cache;
- ``blended``: the same, and what is found elsewhere in stored texts is used, every token of it
  recomputed; on a GPU from a device tier, too;
- ``ranks``: as ``blended``, on two ranks (on a GPU machine it takes two);
- ``served``: as ``blended``, the store behind a server, to which something happens, too;
- ``fronted``: the same, with a small folder of the engine's own in front of it.

In batches a prompt is cut into steps by what else runs, which changes the last bits of a float: the
tokens must be equal there, and log probabilities within ROUNDING, up to a token that a plain engine
itself cannot tell from the next best one within ROUNDING (`ties`). On a GPU give ``--dtype
bfloat16``: its kernels of attention take no float32. Aborted requests are compared as
far as they got. After each batch vLLM's scheduler must know no request and hold no block; after
each engine the store's account of its slots must be right.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import Answer, Engine, EngineDied, Request
from benchmarks.engine_process import connector_config
from benchmarks.engine_safety_faults import Faults, Where
from benchmarks.engine_safety_requests import ALL, CHUNK_TOKENS, LOGPROBS, WAVE_MAX, Mix
from benchmarks.model import demo_text, make_model
from benchmarks.table import Bar, add_arguments, report
from prefixstore import Store, admin

KV_TOKENS, PLAIN_KV_TOKENS = 1024, 65_536
TOKEN_NUMBERS = 2 * 2 * 2 * 64  # layers, K and V, heads, head size
NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
# Two steps of a bfloat16 logit between 8 and 16. Where one chunk of five is another text's, answers
# are off by .19 or more (30 of 30 prompts).
ROUNDING = {"float32": 1e-4, "bfloat16": 0.13}
WAVE_S, SETTLE_S = 60.0, 30.0
FAULT_SHARE = 0.7  # of the batches at whose begin a fault may begin, too
RECOVER_S = 40.0  # at the end, to be served from the store again
SHOWN = 20
METRICS = {
    "vllm:num_preemptions_total": "preemptions",
    "prefixstore:tokens_hit_total": "tokens_hit",
    "prefixstore:loads_failed_total": "loads_failed",
    "prefixstore:loads_stalled_total": "loads_stalled",
    "prefixstore:blend_reused_tokens_total": "blend_reused",
    "prefixstore:device_chunks_hit_total": "device_hits",
}
CACHED: dict[str, Any] = {"enable_prefix_caching": True}
BLENDED: dict[str, Any] = {"blend": ALL, "device": "1MiB"}
# What each is started with, what its connector is told besides where the store is, and that.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any], Where]] = {
    "alone": ({"enable_prefix_caching": False}, {}, Where.FOLDER),
    "mixed": (CACHED, {}, Where.FOLDER),
    "blended": (CACHED, BLENDED, Where.FOLDER),
    "ranks": ({**CACHED, "tensor_parallel_size": 2}, BLENDED, Where.FOLDER),
    "served": (CACHED, BLENDED, Where.SERVER),
    "fronted": (CACHED, BLENDED, Where.SERVER_AND_FOLDER),
}


def start(
    model: Path, dtype: str, connector: dict[str, Any] | None, kv_tokens: int, **given: Any
) -> Engine:
    """An engine with a KV cache of so many tokens; without a connector, a plain one."""
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "block_size": CHUNK_TOKENS // 2,
        "max_num_batched_tokens": CHUNK_TOKENS,
        "max_num_seqs": 16,
        "max_model_len": 896,
        "forked": not torch.cuda.is_available(),
        **given,
    }
    ranks = kwargs.get("tensor_parallel_size", 1)
    token_bytes = TOKEN_NUMBERS * NUMBER_BYTES[dtype] / ranks
    if connector is not None:
        kwargs["kv_transfer_config"] = connector_config(
            None, load="always", bypass_s=0.3, **connector
        )
    return Engine(model, kv_cache_gib=kv_tokens * token_bytes / 2**30, **kwargs)


Truth = dict[tuple[int, ...], Answer]


def ids(request: Request) -> tuple[int, ...]:
    """The tokens of its prompt."""
    assert not isinstance(request.prompt, str)
    return tuple(request.prompt)


def plain_answers(model: Path, dtype: str, requests: Sequence[Request]) -> Truth:
    """What vLLM without a connector answers to each prompt, alone."""
    longest: Counter[tuple[int, ...]] = Counter()
    for request in requests:
        longest[ids(request)] = max(longest[ids(request)], request.max_tokens)
    answers: Truth = {}
    with start(model, dtype, None, PLAIN_KV_TOKENS, enable_prefix_caching=False) as engine:
        for prompt, count in longest.items():
            [answers[prompt]] = engine.generate(
                [list(prompt)], max_tokens=count, logprobs=LOGPROBS, timeout_s=WAVE_S
            )
    return answers


def judge(answer: Answer, truth: Answer, exact: bool, rounding: float) -> str:
    """``bits``, ``rounding``, ``tie``, or what is wrong."""
    ours, theirs = answer.logprobs or [], truth.logprobs or []
    count = len(answer.token_ids)
    if answer.token_ids == truth.token_ids[:count] and ours == theirs[:count]:
        return "bits"
    if exact:
        return "wrong: not the plain engine's bits"
    for i, (token, expected) in enumerate(zip(answer.token_ids, truth.token_ids, strict=False)):
        if token != expected:
            gap = theirs[i][expected] - theirs[i].get(token, float("-inf"))
            return "tie" if gap <= rounding else f"wrong: token {i}, {gap:.3g} from the best"
        if abs(ours[i][token] - theirs[i][token]) > rounding:
            return f"wrong: log probability {i}, off {ours[i][token] - theirs[i][token]:.3g}"
    return "rounding"


class Run:
    """One engine's share."""

    def __init__(
        self, name: str, engine: Engine, faults: Faults, truth: Truth, rounding: float
    ) -> None:
        self.name, self._engine, self._faults, self._truth = name, engine, faults, truth
        self._rounding = rounding
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.recover_s: float | None = None
        self._rest = self._pool()

    def _pool(self) -> dict[str, float]:
        return self._engine.metrics("block_pool")

    def wave(self, requests: list[Request]) -> list[Answer]:
        """Submit a batch, compare its answers, and see that nothing is left of it."""
        answers = self._engine.submit(requests, timeout_s=WAVE_S)
        self.counts["requests"] += len(requests)
        for request, answer in zip(requests, answers, strict=True):
            self.counts["aborted" if answer.finish_reason == "abort" else "finished"] += 1
            prompt = ids(request)
            exact = self.name == "alone" and len(prompt) % CHUNK_TOKENS != 0
            found = judge(answer, self._truth[prompt], exact, self._rounding)
            self.counts[found.partition(":")[0]] += 1
            if found.startswith("wrong"):
                self.failures.append(
                    f"{self.name}: {found}; {len(prompt)} tokens, {answer.cached_tokens} cached, "
                    f"{request.kv_transfer_params}"
                )
        self._at_rest()
        return answers

    def _at_rest(self) -> None:
        """The scheduler knows no request, and every block is free."""
        end = time.monotonic() + SETTLE_S
        while (now := self._pool()) != self._rest:
            if not self._engine.settle(SETTLE_S) or time.monotonic() > end:
                self.counts["leaked"] += 1
                self.failures.append(f"{self.name}: {now} is left, {self._rest} at the start")
                self._rest = now
                return

    def end(self) -> None:
        """Everything is given back, and the store, at peace again, is used."""
        self._faults.end()
        if not self._engine.reset_prefix_cache():
            self.counts["leaked"] += 1
            self.failures.append(f"{self.name}: vLLM says that blocks are in use")
        self._at_rest()
        prompt = list(max((len(one), one) for one in self._truth)[1])
        began = time.monotonic()
        end = began + RECOVER_S
        while (
            time.monotonic() < end
        ):  # the first stores it; a store that was given up is tried again soon
            [answer] = self.wave([Request(prompt, max_tokens=1, logprobs=LOGPROBS)])
            self._engine.reset_prefix_cache()
            if answer.cached_tokens:  # and vLLM itself had nothing
                self.counts["recovered"] = 1
                self.recover_s = time.monotonic() - began
                break
            time.sleep(0.1)
        else:
            self.failures.append(f"{self.name}: not served again\n{self._engine.log_tail()}")
        seen = self._engine.metrics("num_preemptions", "prefixstore:")
        for sample, value in seen.items():
            for name, column in METRICS.items():
                if sample.startswith(name):
                    self.counts[column] += int(value)


def run(
    requests: int, seed: int, names: Sequence[str], dtype: str = "float32"
) -> tuple[list[Run], Faults]:
    """All engines; what came of each."""
    mix = Mix(seed)
    plans = {}
    for i, name in enumerate(names):
        share = (i + 1) * requests // len(names) - i * requests // len(names)
        plans[name] = list(mix.waves(share, most=1 if name == "alone" else WAVE_MAX))
    model = make_model(
        None, text=demo_text(), vocab=1024, max_len=2048,
        layers=2, hidden=128, heads=4, kv_heads=2,
    )  # fmt: skip
    asked = [one for plan in plans.values() for wave in plan for one in wave]
    truth = plain_answers(model, dtype, asked)
    rng = random.Random(seed)
    runs: list[Run] = []
    with (
        tempfile.TemporaryDirectory(prefix="prefixstore-safety-") as folder,
        Faults(Path(folder), rng) as faults,
    ):
        for name in names:
            given, options, where = ENGINES[name]
            with (
                faults.place(where) as place,
                start(model, dtype, {**place, **options}, KV_TOKENS, **given) as engine,
            ):
                runs.append(one := Run(name, engine, faults, truth, ROUNDING[dtype]))
                try:
                    for wave in plans[name]:
                        if rng.random() < FAULT_SHARE:
                            faults.begin()
                        one.wave(wave)
                    one.end()
                except EngineDied as error:
                    one.counts["died or hung"] += 1
                    one.failures.append(f"{name}: {error}")
                faults.end()
            for line in accounting(faults.folder):
                one.counts["accounting"] += 1
                one.failures.append(f"{name}: {line}")
    return runs, faults


def accounting(folder: Path) -> list[str]:
    """What is wrong with the store's account of its slots, nobody being at work any more."""
    with Store.open(folder, create=False) as store:
        store.on_keeper(store.reap)
        return admin.verify(store).accounting


COLUMNS = (
    "requests", "finished", "aborted", *METRICS.values(),
    "bits", "rounding", "tie", "wrong", "leaked", "accounting", "died or hung", "recovered",
)  # fmt: skip


def bars_of(runs: Sequence[Run], names: Sequence[str]) -> list[Bar]:
    """What must be."""
    total = sum((one.counts for one in runs), Counter())
    never = "wrong", "leaked", "accounting", "died or hung"
    bars = [Bar(name, float(total[name]), 0.0, "==") for name in never]
    bars.append(
        Bar("engines that used the store again", float(total["recovered"]), len(names), "==")
    )
    if {"mixed", "blended"} & set(names):
        bars.append(Bar("preemptions", float(total["preemptions"]), 0.0, ">"))
    if "blended" in names:
        bars.append(Bar("tokens reused elsewhere", float(total["blend_reused"]), 0.0, ">"))
    return bars


def main(argv: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = add_arguments(argparse.ArgumentParser(prog="python -m benchmarks.engine_safety"))
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--dtype", choices=list(NUMBER_BYTES), default="float32")
    args = parser.parse_args(argv)
    began = time.monotonic()
    runs, faults = run(args.requests, args.seed, args.engines, args.dtype)
    for line in [line for one in runs for line in one.failures][:SHOWN]:
        print(line, file=sys.stderr)
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s; faults: {dict(faults.done)}; not made: {dict(faults.failed)}",
          file=sys.stderr)  # fmt: skip
    rows = [
        {
            "engine": one.name,
            **{name: one.counts[name] for name in COLUMNS},
            "recovered_after_s": one.recover_s,
        }
        for one in runs
    ]
    report("Engine safety", rows, bars_of(runs, args.engines), args)


if __name__ == "__main__":
    main()
