"""Two GPUs of one host: tensor parallelism with a store, and prefill on one, decode on the other.

``python -m benchmarks.two_gpus [--json] [--check] [--quick] [--model DIR] [--tokens N ...]
[--prompts 4] [--rounds 3]``

Real vLLM; without GPUs two engines or ranks share the CPU's cores. ``--model`` as for
`benchmarks.prefix`, which is also what is done with an engine of two ranks: prompts are asked cold,
from vLLM's own prefix cache, from the memory tier, and by another engine after ``kill -9``. Then
two engines of one rank, a GPU each, share a store's folder. Each prompt is asked of the decode
engine with the store left alone (the truth), then of the prefill engine, for one token, and at once
of the decode engine again, which waits for what is not stored yet; then, its own prefix cache
emptied, once more.

What must hold: all tokens of an answer that was handed over are those of the cold one, and all of
its prompt's chunks came from the store.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import Answer, Engine
from benchmarks.engine_model import chosen_model, graphs, store_folder
from benchmarks.engine_process import connector_config
from benchmarks.prefix import STEP_TOKENS, add_prompts, bench_of, setting_for
from benchmarks.prefix import measure as measure_prefixes
from benchmarks.prefix_bench import BEHIND_TOKENS, VOCAB
from benchmarks.restart import Results, Row, forget
from benchmarks.table import Bar, add_arguments, report, told_so_far

COLD, PREFILL = "decode engine, cold", "prefill engine, one token"
FIRST, AGAIN = "decode engine, handed over", "the same, once more"
CASES = (COLD, PREFILL, FIRST, AGAIN)
ANSWER_TOKENS = 8
DEADLINE_S, WAIT_MS = 120.0, 10_000
TRIES = 5  # a save that found no room is dropped, and the prompt computed again
BYPASS = {"prefixstore": {"read": False, "write": False}}
WAITING = {"prefixstore": {"write": False, "wait_ms": WAIT_MS}}


class Handover:
    """Prompts of each length, asked of a prefill and a decode engine."""

    def __init__(self, lengths: Sequence[int], prompts: int) -> None:
        self._prompts = prompts
        self.results = {count: Results(CASES) for count in lengths}

    def run(self, prefill: Engine, decode: Engine) -> None:
        """One more prompt of each length comes first and warms what there is to warm."""
        chosen = random.Random(9)
        for count, results in self.results.items():
            for number in range(self._prompts + 1):
                prompt = chosen.choices(range(1, VOCAB), k=count + BEHIND_TOKENS)
                answers = self._one(prefill, decode, prompt, count)
                for case, answer in answers.items() if number else ():
                    results.add(case, number, answer)

    def _one(
        self, prefill: Engine, decode: Engine, prompt: list[int], count: int
    ) -> dict[str, Answer]:
        forget(decode)
        found = {COLD: _ask(decode, prompt, BYPASS)}
        for _ in range(TRIES):
            forget(decode)
            forget(prefill)
            made = _ask(prefill, prompt, None, 1)
            answer = _ask(decode, prompt, WAITING)
            if (answer.cached_tokens or 0) >= count:
                break
        else:
            raise RuntimeError(f"{answer.cached_tokens} of {count} tokens were handed over")
        # What came of it is one token; it is compared with the first of the cold one's.
        made.token_ids += found[COLD].token_ids[1:]
        forget(decode)
        return {**found, PREFILL: made, FIRST: answer, AGAIN: _ask(decode, prompt, WAITING)}

    def rows(self) -> list[Row]:
        """One line a length and case."""
        return [{"tokens": n, **row} for n, found in self.results.items() for row in found.rows()]


def _ask(
    engine: Engine, prompt: list[int], params: dict[str, Any] | None, tokens: int = ANSWER_TOKENS
) -> Answer:
    [answer] = engine.generate(
        [prompt], max_tokens=tokens, kv_transfer_params=[params], timeout_s=DEADLINE_S
    )
    engine.settle()
    return answer


def device_of(number: int) -> dict[str, str]:
    """The environment of an engine that has one GPU, or a part of the CPU's cores, to itself."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(2)]
        return {"CUDA_VISIBLE_DEVICES": names[number]}
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[number::2] or cores
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, mine))}


def measure_handover(
    handover: Handover, model: Path, store_bytes: int, longest: int, given: dict[str, Any]
) -> None:
    """Two engines on one folder."""
    arguments: dict[str, Any] = {
        "max_model_len": longest + ANSWER_TOKENS, "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": 4, "enable_prefix_caching": True, **given,
    }  # fmt: skip
    with ExitStack() as stack:
        folder = stack.enter_context(store_folder())
        engines = []
        for number, role in enumerate(("kv_producer", "kv_consumer")):
            print(f"engine: {role} ...", file=sys.stderr, flush=True)
            config = connector_config(
                folder, memory=store_bytes, disk=0, load="always", stall_ms=5000, staging="2GiB"
            )
            engine = Engine(
                model, env=device_of(number), kv_transfer_config={**config, "kv_role": role},
                **arguments,
            )  # fmt: skip
            engines.append(stack.enter_context(engine))
        handover.run(*engines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_gpus")
    add_arguments(parser)
    add_prompts(parser)
    args = parser.parse_args(argv)
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        parser.error("it needs two GPUs, and there is one")
    model, given = chosen_model(args.model, 0.5, 24.0)
    given |= graphs(args)
    bench, lengths = bench_of(args)
    store_bytes, began = args.store_gib << 30, time.monotonic()
    ranks = {**given, "tensor_parallel_size": 2}
    handover = Handover(lengths, args.prompts)

    def rows() -> list[Row]:
        parts = ("one of two ranks", bench.rows()), ("two", handover.rows())
        return [{"engines": name, **row} for name, found in parts for row in found]

    title = "two GPUs, ms to the first token"
    with told_so_far(title, rows):
        with store_folder() as folder:
            setting = setting_for(max(lengths), model, folder, store_bytes, ranks)
            measure_prefixes(bench, setting, peers=[])
        longest = max(lengths) + 2 * BEHIND_TOKENS
        measure_handover(handover, model, store_bytes, longest, given)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    differing = sum(sum(one.differing.values()) for one in handover.results.values())
    bars = [
        *bench.bars([]),
        Bar("answers handed over that differ from the cold ones", differing, 0, "=="),
    ]
    report(title, rows(), [] if args.quick else bars, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
