"""Does the router find prefixes that round robin does not, and what does it add to a request?

``python -m benchmarks.route [--json] [--check] [--quick]``

Four vLLM servers on the CPU (two with ``--quick``), each with a prefix cache of its own that holds
about a third of all conversations, and no store. A trace of conversations of several turns behind
a few system prompts, in random order, is asked three times: round robin, with the router's estimate
of what workers have, and with their KV events. Hits are those that vLLM counts. Then single
requests to one worker, in turn directly and through the router. Each way has texts of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout

from benchmarks.model import demo_text, make_model
from benchmarks.server_process import RouterProcess
from benchmarks.table import Bar, add_arguments, report, spread
from benchmarks.vllm_server import VllmServer, free_port

BLOCK_TOKENS, MODEL_LEN, ANSWER_TOKENS = 32, 2048, 8
SYSTEM_CHARS, TURN_CHARS = 500, 400
CONCURRENCY, REQUEST_S = 4, 120.0
GAIN_MIN, ADDED_MS_MAX = 1.5, 20.0
WAYS = ("round robin", "router, estimates", "router, KV events")
WORKER = "X-Prefixstore-Worker"
Row = dict[str, object]
WORDS = (
    "--dtype=float32", f"--block-size={BLOCK_TOKENS}", f"--max-model-len={MODEL_LEN}",
    f"--max-num-batched-tokens={MODEL_LEN}", "--max-num-seqs=16", "--enforce-eager",
    "--enable-prefix-caching", "--served-model-name=m", "--kv-cache-memory-bytes=67108864",
    "--chat-template={% for one in messages %}{{ one.role }}: {{ one.content }} {% endfor %}",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of a run: how many workers, conversations, turns, system prompts; blocks of a cache; single
    requests each way."""

    workers: int = 4
    talks: int = 24
    turns: int = 6
    systems: int = 4
    blocks: int = 320
    singles: int = 40


QUICK = Sizes(workers=2, talks=8, turns=4, systems=2, blocks=120, singles=10)


class Workers:
    """vLLM servers that tell of their KV events."""

    def __init__(
        self, sizes: Sizes, folder: Path, stack: ExitStack, model: Path | None = None,
        words: Sequence[str] = WORDS, config: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        model = model or make_model(
            None, text=demo_text(), vocab=1024, max_len=MODEL_LEN, layers=2, hidden=128, heads=4,
            kv_heads=2,
        )  # fmt: skip
        self.specs: list[dict[str, str]] = []
        self.servers: list[VllmServer] = []
        for number in range(sizes.workers):
            ports = free_port(), free_port()
            # vLLM binds what has a star, and connects to others.
            told = {"enable_kv_cache_events": True, "publisher": "zmq",
                    "endpoint": f"tcp://*:{ports[0]}",
                    "replay_endpoint": f"tcp://127.0.0.1:{ports[1]}"}  # fmt: skip
            server = VllmServer(
                model, *words, f"--num-gpu-blocks-override={sizes.blocks}",
                f"--kv-events-config={json.dumps(told)}",
                kv_transfer_config=config, log=folder / f"vllm{number}.log",
            )  # fmt: skip
            self.servers.append(stack.enter_context(server))
            at = [f"tcp://127.0.0.1:{port}" for port in ports]
            self.specs.append({"url": server.url, "kv_events": at[0], "replay": at[1]})
        for server in self.servers:
            server.wait()

    @property
    def names(self) -> list[str]:
        """As a router calls them."""
        return [spec["url"].removeprefix("http://") for spec in self.specs]

    def router(self, folder: Path, *, hears: bool) -> RouterProcess:
        """A new router in front of them; ``hears``: it gets their KV events."""
        specs = [spec if hears else {"url": spec["url"]} for spec in self.specs]
        file = folder / "workers.json"
        file.write_text(json.dumps(specs))
        log = folder / "router.log"
        return RouterProcess([], f"--workers={file}", "--seed=1", log=log)

    def counted(self) -> list[float]:
        """Tokens asked of the workers' caches, and of those found, so far."""
        totals = [0.0, 0.0]
        for server in self.servers:
            with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as page:
                text = page.read().decode()
            for at, name in enumerate(("queries", "hits")):
                found = re.findall(rf"^vllm:prefix_cache_{name}_total\{{.*\}} (\S+)$", text, re.M)
                totals[at] += sum(map(float, found))
        return totals


@dataclass
class Talks:
    """Conversations: what each has said so far, and the order of their turns."""

    sizes: Sizes
    way: str
    said: list[str] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(7)  # the same trace each way
        systems = [f"{self.way} {n} {self._text(SYSTEM_CHARS)}" for n in range(self.sizes.systems)]
        self.said = [systems[n % self.sizes.systems] for n in range(self.sizes.talks)]
        self.order = [n for n in range(self.sizes.talks) for _ in range(self.sizes.turns)]
        self._rng.shuffle(self.order)
        self.questions = [self._text(TURN_CHARS) for _ in self.order]

    def _text(self, chars: int) -> str:
        text = demo_text()
        at = self._rng.randrange(len(text) - chars)
        return text[at : at + chars]


async def ask(
    session: ClientSession, url: str, prompt: Any, max_tokens: int, to: str | None = None,
    **more: Any,
) -> tuple[dict[str, Any], float]:  # fmt: skip
    """An answer, and ms; ``more`` is the rest of the body. Raises RuntimeError if it is none."""
    body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
    headers = {} if to is None else {WORKER: to}
    began = time.monotonic()
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        told: dict[str, Any] = await answer.json()
        if not answer.ok:
            raise RuntimeError(f"{answer.status}: {told}")
    return told, 1000 * (time.monotonic() - began)


async def talk(url: str, talks: Talks, to: Callable[[], str | None]) -> list[float]:
    """All turns in their order, some at once, those of a conversation one by one; ms of each."""
    limit = asyncio.Semaphore(CONCURRENCY)
    turns = [asyncio.Lock() for _ in talks.said]
    took: list[float] = []

    async def turn(session: ClientSession, one: int, question: str) -> None:
        async with turns[one], limit:
            talks.said[one] += question
            told, ms = await ask(session, url, talks.said[one], ANSWER_TOKENS, to())
            talks.said[one] += str(told["choices"][0]["text"])
            took.append(ms)

    async with ClientSession(timeout=ClientTimeout(total=REQUEST_S)) as session:
        asked = zip(talks.order, talks.questions, strict=True)
        await asyncio.gather(*(turn(session, one, question) for one, question in asked))
    return took


def one_way(way: str, workers: Workers, sizes: Sizes, folder: Path) -> Row:
    """Ask the trace once. Raises RuntimeError."""
    turn = count()

    def to() -> str | None:
        return workers.names[next(turn) % len(workers.names)] if way == WAYS[0] else None

    with workers.router(folder, hears=way == WAYS[2]) as router:
        router.wait(len(workers.names))
        before = workers.counted()
        took = asyncio.run(talk(router.url, Talks(sizes, way), to))
        queries, hits = (b - a for a, b in zip(before, workers.counted(), strict=True))
    return row_of(way, took, queries, hits)


async def singles(direct: str, routed: str, prompts: Sequence[Any]) -> tuple[list[float], ...]:
    """ms of requests made directly, and of the same through the router, in turn; each prompt having
    been asked before."""
    to = direct.removeprefix("http://")
    alone, through = list[float](), list[float]()
    async with ClientSession(timeout=ClientTimeout(total=REQUEST_S)) as session:
        for prompt in prompts:
            await ask(session, direct, prompt, 1)
            alone.append((await ask(session, direct, prompt, 1))[1])
            through.append((await ask(session, routed, prompt, 1, to))[1])
    return alone, through


def added(workers: Workers, sizes: Sizes, folder: Path) -> tuple[list[Row], list[Bar]]:
    """What the router adds to requests of token ids, and of text, which it has tokenized."""
    url = workers.specs[0]["url"]
    ids = [[n + 1, *range(2, 1000)] for n in range(sizes.singles)]
    text = Talks(sizes, "single").said[0]
    texts = [f"{n} {text}" * 3 for n in range(sizes.singles)]
    rows: list[Row] = []
    bars = []
    with RouterProcess([url], log=folder / "router.log") as router:
        router.wait(1)
        for name, prompts in (("token ids", ids), ("text", texts)):
            alone, through = asyncio.run(singles(url, router.url, prompts))
            rows += [row_of(f"{name}, directly", alone), row_of(f"{name}, routed", through)]
            gaps = [b - a for a, b in zip(alone, through, strict=True)]
            bars.append(
                Bar(f"ms added to a prompt of {name}", spread(gaps)["median"], ADDED_MS_MAX, "<=")
            )
    return rows, bars


def row_of(way: str, took: Sequence[float], queries: float = 0, hits: float = 0) -> Row:
    """A row of the table; without tokens where they were not counted."""
    ms = spread(took)
    return {
        "way": way, "requests": len(took), "prompt_tokens": queries or None,
        "hit_tokens": hits if queries else None, "hit_rate": hits / queries if queries else None,
        "median_ms": ms["median"], "max_ms": ms["max"],
    }  # fmt: skip


def run(sizes: Sizes, folder: Path) -> tuple[list[Row], list[Bar]]:
    """Everything, with the logs in ``folder``. Raises RuntimeError, OSError."""
    with ExitStack() as stack:
        workers = Workers(sizes, folder, stack)
        rows = [one_way(way, workers, sizes, folder) for way in WAYS]
        times, bars = added(workers, sizes, folder)
    rates = [float(str(row["hit_rate"])) for row in rows]
    gains = [
        Bar(f"hit rate, {way} / round robin", rate / rates[0], GAIN_MIN, ">=")
        for way, rate in zip(WAYS[1:], rates[1:], strict=True)
    ]
    return rows + times, gains + bars


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.route")
    parser.add_argument(
        "--quick", action="store_true", help="two workers, a trace too short to reach the bars"
    )
    args = add_arguments(parser).parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prefixstore-route-"))
    try:
        rows, bars = run(QUICK if args.quick else Sizes(), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report("A router in front of engines with caches of their own", rows, bars, args)


if __name__ == "__main__":
    main()
