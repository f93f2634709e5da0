"""What the engine tests share: one tiny model, its prompts, and the answers of a plain engine.

The truth is vLLM without a connector. Attention in float32 on a CPU depends, in the last bits, on
where a prompt was cut into steps, so engines here take ``STEP_TOKENS`` a step, which is also the
size of a chunk: a prompt computed from the start and one computed behind a hit are then cut at the
same places, and tokens and log probabilities must be equal to the bit.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import Answer, Engine
from benchmarks.engine_process import connector_config
from benchmarks.model import demo_text, make_model
from prefixstore import Store, admin, config

CHUNK_TOKENS = 64
STEP_TOKENS = CHUNK_TOKENS
BLOCK_TOKENS = 32
VOCAB = 1024
LOGPROBS = 5
ANSWER_TOKENS, LONG_TOKENS = 8, 100
DEADLINE_S = 20.0
NEVER = {"prefixstore": {"read": False, "write": False}}
ONLY_READ = {"prefixstore": {"write": False}}
ONLY_WRITE = {"prefixstore": {"read": False}}

Metrics = dict[str, float]


def tokens(seed: int, count: int) -> list[int]:
    """A prompt of random tokens: any two share no chunk."""
    return random.Random(seed).choices(range(1, VOCAB), k=count)


_LONG = tokens(1, 340)
PROMPTS: dict[str, list[int]] = {
    "five": _LONG,  # five chunks and 20 tokens
    "ten": tokens(2, 650),
    "fork": _LONG[:256] + tokens(3, 200),  # shares four chunks with "five"
    "midway": _LONG[:96] + tokens(4, 60),  # leaves "five" in the middle of its second chunk
    "short": tokens(5, 40),  # less than a chunk
    "whole": tokens(6, 384),  # six chunks and nothing behind them
    **{f"batch{i}": tokens(100 + i, 150 + 70 * i) for i in range(6)},
}


def tiny_model(folder: Path | None = None, **changes: Any) -> Path:
    """The model of these tests: 2 layers, 2 KV heads, float32; 2 KiB of KV a token."""
    sizes: dict[str, Any] = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2}
    return make_model(folder, text=demo_text(), vocab=VOCAB, max_len=2048, **{**sizes, **changes})


def start(
    model: Path, store: Path | None, *, extra: dict[str, Any] | None = None, **changes: Any
) -> Engine:
    """An engine with the store in a folder, or a plain one (None)."""
    kwargs: dict[str, Any] = {
        "dtype": "float32",
        "block_size": BLOCK_TOKENS,
        "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": 16,
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "kv_cache_gib": 0.125,
        "forked": True,
    }
    if store is not None:
        kwargs["kv_transfer_config"] = connector(store, **(extra or {}))
    return Engine(model, **{**kwargs, **changes})


def connector(store: Path, *, by_name: bool = False, **extra: Any) -> dict[str, Any]:
    """``--kv-transfer-config``; ``by_name`` leaves finding the connector to the entry point."""
    # A busy machine's pauses are tested where they are the point (test_trouble): a store that is
    # left alone for ten seconds after one of them saves nothing either.
    options = {"memory": "256MiB", "disk": "1GiB", "load": "always", "stall_ms": 5000, **extra}
    config = connector_config(store, **options)
    if by_name:
        del config["kv_connector_module_path"]
    return config


def ask(
    engine: Engine, prompt: str | Sequence[int], max_tokens: int = ANSWER_TOKENS, **more: Any
) -> Answer:
    """One prompt, or the name of one, alone in the engine, which then has nothing left to do."""
    ids = PROMPTS[prompt] if isinstance(prompt, str) else list(prompt)
    params = more.pop("params", None)
    [answer] = engine.generate(
        [ids], max_tokens=max_tokens, logprobs=LOGPROBS, kv_transfer_params=[params], **more
    )
    engine.settle()
    return answer


@dataclass(frozen=True)
class Truth:
    """Answers of a plain engine. ``second_turn`` follows on a long answer to "five"; ``long`` are
    answers of LONG_TOKENS to the first batch prompts."""

    answers: dict[str, Answer]
    long: dict[str, Answer]
    prompt_logprobs: Answer
    first_turn: Answer
    second_turn: Answer

    def __getitem__(self, name: str) -> Answer:
        return self.answers[name]


def second_prompt(first_turn: Answer) -> list[int]:
    """The next prompt of a conversation: all so far, and a question."""
    return PROMPTS["five"] + first_turn.token_ids + tokens(7, 30)


def plain_answers(model: Path) -> Truth:
    """Ask vLLM without a connector."""
    with start(model, None) as engine:
        first = ask(engine, "five", 120)
        return Truth(
            {name: ask(engine, name) for name in PROMPTS},
            {f"batch{i}": ask(engine, f"batch{i}", LONG_TOKENS) for i in range(4)},
            ask(engine, "five", prompt_logprobs=3),
            first,
            ask(engine, second_prompt(first)),
        )


# ---------------------------------------------------------------------- comparing
def same(one: Answer, other: Answer) -> bool:
    """Equal tokens and log probabilities, to the bit."""
    return one.token_ids == other.token_ids and one.logprobs == other.logprobs


def distance(one: Answer, other: Answer) -> float:
    """Largest difference of a log probability; infinite where the tokens differ."""
    if one.token_ids != other.token_ids:
        return float("inf")
    assert one.logprobs is not None
    assert other.logprobs is not None
    return max(
        abs(left[token] - right[token])
        for token, left, right in zip(one.token_ids, one.logprobs, other.logprobs, strict=True)
    )


# ---------------------------------------------------------------------- counting
def counted(engine: Engine) -> Metrics:
    """The metrics, once the threads have ended what the last request began.

    vLLM passes a connector's counters on with its steps, so short requests make some.
    """
    end, before = time.monotonic() + DEADLINE_S, None
    while True:
        ask(engine, tokens(8, 8), 1, params=NEVER)
        now = engine.metrics("prefixstore")
        if now == before:
            return now
        assert time.monotonic() < end, "the counters do not come to rest"
        before = now
        time.sleep(0.05)


def since(before: Metrics, after: Metrics) -> Metrics:
    """What was counted between two looks; zeros left out, ``prefixstore:`` and ``_total`` too."""
    return {
        name.removeprefix("prefixstore:").replace("_total", ""): value - before.get(name, 0.0)
        for name, value in after.items()
        if value != before.get(name, 0.0)
    }


def totals(engine: Engine) -> Metrics:
    """What was counted since the engine's start, named as by `since`."""
    return since({}, counted(engine))


@contextmanager
def counting(engine: Engine) -> Iterator[Metrics]:
    """A dict that holds, once the block has ended, what was counted in it."""
    before, found = counted(engine), Metrics()
    yield found
    found.update(since(before, counted(engine)))


def hit_tokens(found: Metrics, tier: str = "") -> float:
    """Tokens claimed from the store, from one tier or from all."""
    return sum(
        value
        for name, value in found.items()
        if name.startswith("tokens_hit{") and f'tier="{tier}' in name
    )


def misses(found: Metrics) -> dict[str, float]:
    """Requests that loaded nothing, by reason."""
    head = 'misses{reason="'
    return {
        name[len(head) :].rstrip('"}'): value
        for name, value in found.items()
        if name.startswith(head)
    }


# ---------------------------------------------------------------------- the store from outside
def wait_for_chunks(
    folder: Path, count: int, *, on_disk: bool = False, codec: str | None = None
) -> None:
    """Wait until the store holds that many chunks; ``codec``: of engines with that one."""
    end = time.monotonic() + DEADLINE_S
    with Store.open(folder, create=False) as store:
        while True:
            names = {
                record.identity.namespace
                for record in store.namespaces()
                if codec in (None, record.identity.codec)
            }
            listed = [one for one in admin.list_chunks(store) if one.row.namespace in names]
            if sum(not on_disk or 2 in chunk.tiers for chunk in listed) >= count:
                return
            assert time.monotonic() < end, f"{len(listed)} chunks, {count} expected"
            time.sleep(0.02)


def to_disk_only(folder: Path) -> None:
    """Empty the memory tier, and wait until it stays empty.

    An engine may still hold a lease, or be about to promote what it has read: it does so once it
    has read nothing for ``config.QUIET_S``, and nobody else can see that it will.
    """
    end = time.monotonic() + DEADLINE_S
    with Store.open(folder, create=False) as store:
        admin.empty_memory(store)
        empty_since = time.monotonic()
        while time.monotonic() < empty_since + 10 * config.QUIET_S:
            time.sleep(config.QUIET_S / 2)
            if any(chunk.tiers != (2,) for chunk in admin.list_chunks(store)):
                assert time.monotonic() < end, "chunks stay in memory"
                admin.empty_memory(store)
                empty_since = time.monotonic()


def store_counters(folder: Path) -> dict[str, int]:
    """The counters of ``admin.stats``."""
    with Store.open(folder, create=False) as store:
        return dict(admin.stats(store)["counters"])


def remove_memory_of(folder: Path) -> None:
    """Remove the memory tiers of the store, or stores, that were in a folder."""
    for origin in Path("/dev/shm").glob("prefixstore-*/origin"):
        with suppress(FileNotFoundError):  # a store of somebody else's, just being removed
            if Path(origin.read_text()).is_relative_to(folder):
                shutil.rmtree(origin.parent)


def damage(folder: Path) -> int:
    """Flip a byte of every slot of both tiers; returns how many slots there are in use."""
    with Store.open(folder, create=False) as store:
        store.flush()
        numbers = admin.stats(store)
    for where in (folder, Path(numbers["memory_dir"])):
        for path in where.glob("*.slots"):
            slot_bytes = int(path.stem.rpartition("-")[2])
            with path.open("r+b", buffering=0) as file:
                for at in range(1000, path.stat().st_size, slot_bytes):
                    [byte] = os.pread(file.fileno(), 1, at)
                    os.pwrite(file.fileno(), bytes([byte ^ 0x10]), at)
                os.fsync(file.fileno())
    return int(sum(tier["chunks"] for tier in numbers["tiers"].values()))
