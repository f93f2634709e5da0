"""The whole point in four minutes: a prompt's KV outlives a killed engine, and a reboot.

`python -m benchmarks.demo [--dir DIR]` (scripts/demo sets everything up first). A real vLLM engine
on the CPU answers one long prompt four times: cold, from the memory tier, from the memory tier
after SIGKILL, from disk after the memory tier is gone. Exits 1 unless all four answers have the
same tokens and the same log probabilities, to the bit, and came from where the step says. The
second act is `benchmarks.demo_blend`.

Why bits can be compared: attention in float32 on a CPU depends, in the last bits, on where a prompt
is cut into steps. Here a step takes STEP_TOKENS, the prompt is some whole steps and a tail shorter
than a chunk, so a cold run and a hit are cut at the same places.

Owns a temporary store, its shared memory and the engines; all are gone at the end, however it ends
(after SIGKILL of the demo itself, the folders stay).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo_blend import SecondAct, say
from benchmarks.engine import Answer, Engine, EngineDied
from benchmarks.engine_process import connector_config
from benchmarks.model import demo_text, make_model, tokenize
from benchmarks.table import print_table
from prefixstore import Store, StoreError, admin
from prefixstore.config import format_bytes, load_settings

STEP_TOKENS = 1024
WHOLE_STEPS = 3
TAIL_TOKENS = 40
CHUNK_TOKENS = 64
BLOCK_TOKENS = 64
ANSWER_TOKENS = 16
LOGPROBS = 5
STORED_DEADLINE_S = 30.0
CACHED_TOKENS = WHOLE_STEPS * STEP_TOKENS
_OFF = {"prefixstore": {"read": False, "write": False}}


@dataclass(frozen=True)
class Shown:
    """One line of the table. ``tier`` is where the tokens had to come from; "" for nowhere."""

    name: str
    tier: str
    answer: Answer
    reused: dict[str, int]

    def right_tier(self) -> bool:
        """Whether the counters say that every token came from where it had to."""
        wanted = {self.tier: CACHED_TOKENS} if self.tier else {}
        return {tier: count for tier, count in self.reused.items() if count} == wanted


class Demo:
    """The four steps. ``folder`` is the store's, ``log`` the file engines print to."""

    def __init__(self, folder: Path, model: Path, tokens: list[int], log: Path) -> None:
        self._folder, self._model, self._log = folder, model, log
        self._prompt = tokens[: CACHED_TOKENS + TAIL_TOKENS]
        self._warm_up = tokens[1 : CACHED_TOKENS + TAIL_TOKENS]  # shares no chunk with the prompt
        self.shown: list[Shown] = []

    def run(self) -> None:
        """All steps, in order."""
        with self._engine() as engine:
            self._ask(engine, "cold", "")
            self._wait_until_durable()
            say("Dropping vLLM's own prefix cache, so that only the store can help.")
            engine.reset_prefix_cache()
            self._ask(engine, "warm", "memory")
            say(f"kill -9 {engine.pid} (the engine).")
            engine.kill()
        with self._engine() as engine:
            self._ask(engine, "after kill -9", "memory")
            say(f"kill -9 {engine.pid}, and its shared memory is deleted: what a reboot leaves.")
            engine.kill()
        forget_memory(self._folder)
        with self._engine() as engine:
            self._ask(engine, "after a reboot", "disk")

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        say("Starting a vLLM engine (20 to 60 s) ...")
        transfer = connector_config(
            self._folder, memory="256MiB", disk="512MiB", chunk_tokens=CHUNK_TOKENS
        )
        with Engine(
            self._model,
            log=self._log,
            start_timeout_s=300.0,
            dtype="float32",
            kv_cache_gib=0.25,
            max_model_len=CACHED_TOKENS + 2 * CHUNK_TOKENS,
            max_num_batched_tokens=STEP_TOKENS,
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=True,
            kv_transfer_config=transfer,
        ) as engine:
            say(f"It is up after {engine.start_s:.0f} s. One other prompt, without the store, to "
                "warm it up.")  # fmt: skip
            engine.generate([self._warm_up], max_tokens=2, kv_transfer_params=[_OFF])
            yield engine

    def _ask(self, engine: Engine, name: str, tier: str) -> None:
        before = hit_tokens(engine)
        [answer] = engine.generate([self._prompt], max_tokens=ANSWER_TOKENS, logprobs=LOGPROBS)
        engine.settle()
        after = hit_tokens(engine)
        reused = {tier: int(after[tier] - before.get(tier, 0)) for tier in after}
        self.shown.append(Shown(name, tier, answer, reused))
        total = sum(reused.values())
        say(f"{name}: first token after {answer.ttft_ms:.0f} ms, {total} of {len(self._prompt)} "
            "prompt tokens from the store.")  # fmt: skip

    def _wait_until_durable(self) -> None:
        began = time.monotonic()
        with Store.open(self._folder, create=False) as store:
            while True:
                tiers = admin.stats(store)["tiers"]
                if tiers["disk"]["chunks"] * CHUNK_TOKENS == CACHED_TOKENS:
                    break
                if time.monotonic() - began > STORED_DEADLINE_S:
                    raise StoreError(f"not on disk after {STORED_DEADLINE_S:.0f} s: {tiers}")
                time.sleep(0.02)
        size = format_bytes(tiers["disk"]["allocated_bytes"])
        say(f"Its KV ({size}) is in memory and on disk, "
            f"{1000 * (time.monotonic() - began):.0f} ms after the answer.")  # fmt: skip

    def report(self) -> bool:
        """Print the table; returns whether everything is as it must be."""
        cold = self.shown[0].answer
        rows: list[list[object]] = []
        good = True
        for shown in self.shown:
            answer = shown.answer
            tokens, logprobs = answer.token_ids == cold.token_ids, answer.logprobs == cold.logprobs
            good &= tokens and logprobs and shown.right_tier()
            same = [None, None] if answer is cold else [tokens, logprobs]
            tiers = " + ".join(tier for tier, count in shown.reused.items() if count) or None
            reused = sum(shown.reused.values())
            rows.append([shown.name, answer.ttft_ms, reused, tiers, *same, logprob(answer)])
        print()
        print_table(
            f"One prompt of {len(self._prompt)} tokens, {ANSWER_TOKENS} tokens of answer",
            ["step", "TTFT ms", "tokens reused", "from", "same tokens", "same logprobs",
             "first logprob"],
            rows,
        )  # fmt: skip
        print()
        return good


def logprob(answer: Answer) -> str:
    """Log probability of the first token, with all its digits."""
    assert answer.logprobs is not None
    return repr(answer.logprobs[0][answer.token_ids[0]])


def hit_tokens(engine: Engine) -> dict[str, float]:
    """Prompt tokens taken from the store so far, by tier: the connector's Prometheus counter."""
    found = engine.metrics("prefixstore:tokens_hit_total")
    return {name.split('tier="')[1].rstrip('"}'): value for name, value in found.items()}


def forget_memory(folder: Path) -> None:
    """Delete the memory tier of a store that no process has open."""
    settings = load_settings(folder) if folder.is_dir() else None
    if settings is not None:
        shutil.rmtree(settings.live_dir(folder), ignore_errors=True)


def what_next(folder: Path | None) -> None:
    """How to go on from here."""
    where = shlex.quote(str(folder)) if folder else "/var/cache/kv"
    command = os.path.relpath(Path(sys.executable).parent / "prefixstore")
    print("What next:")
    print("  vllm serve MODEL --kv-transfer-config "
          f'"$({command} config {where} --memory 8GiB --disk 200GiB --json)"')  # fmt: skip
    print(f"  {command} stats {where}")


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="new folder for the store, kept at the end")
    args = parser.parse_args()
    if args.dir is not None and args.dir.exists() and any(args.dir.iterdir()):
        parser.error(f"{args.dir} is not empty; the first answer must be a cold one")
    temporary = Path(tempfile.mkdtemp(prefix="prefixstore-demo-"))
    folder = (args.dir or temporary / "store").expanduser().absolute()
    try:
        text = demo_text()
        model = make_model(None, text=text)
        print("1. A prompt's KV outlives the engine\n")
        say(f"A small Llama with random weights is in {os.path.relpath(model)}; the prompt is "
            "this project's own text.")  # fmt: skip
        say(f"The store is {folder}.")
        log = temporary / "engine.log"
        demo = Demo(folder, model, tokenize(model, text), log)
        demo.run()
        good = demo.report()
        if good:
            print("All four answers are the same, to the last bit.\n")
            good = SecondAct(temporary, model, log).run()
    except (EngineDied, StoreError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    finally:
        for index in temporary.glob("*/index"):
            forget_memory(index.parent)
        shutil.rmtree(temporary, ignore_errors=True)
    if not good:
        print("demo: FAILED: an answer is not what it must be, or came from elsewhere",
              file=sys.stderr)  # fmt: skip
        return 1
    what_next(args.dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
