"""Two prefill and two decode engines share a store through a server: are answers right, whatever
dies, and what does it cost?

``python -m benchmarks.disaggregated [--json] [--check] [--requests N]``

Real vLLM servers on the CPU, a small trained model (CS-MQAR, `benchmarks.quality`), before them
`prefixstore route`, behind them `prefixstore serve`. The truth is one plain engine. In order:
engines start and serve while there is no server; then with it; roles swapped, an engine taken away
and added again, a prefill engine killed, each in the middle of a part; the server killed and
started again. Each part has prompts of its own, so all of them are computed once.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout

from benchmarks.demo import forget_memory
from benchmarks.engine import Engine
from benchmarks.engine_process import connector_config
from benchmarks.model import REPO_ROOT
from benchmarks.quality import csmqar
from benchmarks.server_process import RouterProcess, ServerProcess
from benchmarks.table import Bar, add_arguments, report, spread
from benchmarks.vllm_server import VllmServer, free_port

MODEL = REPO_ROOT / "models" / "csmqar-5m"
FACTS = csmqar.Spec(family="B", chunks=8)
QUERIES = 5  # prompts of one story: they share all but the question
CONCURRENCY = 8
ANSWER_TOKENS = 4
REQUEST_S = 120.0
ENGINE: dict[str, Any] = {
    "dtype": "float32", "block_size": 64, "max_model_len": 2048, "max_num_batched_tokens": 2048,
    "max_num_seqs": 16, "enable_prefix_caching": False,
}  # fmt: skip
WORDS = (
    "--dtype=float32", "--block-size=64", "--max-model-len=2048", "--max-num-batched-tokens=2048",
    "--max-num-seqs=16", "--no-enable-prefix-caching", "--enforce-eager",
    "--kv-cache-memory-bytes=268435456",
)  # fmt: skip
WITHOUT, COLD = 1, 5  # seeds of the parts that nothing happens in: a few requests show enough
BYPASS = {"prefixstore": {"read": False, "write": False}}
EXTRA_MS_MAX, BACK_S_MAX = 300.0, 5.0
DOWN_S = 2.0  # the server is away so long
STALL_MS = 250  # eight processes share the cores of this machine


@dataclass(frozen=True)
class Asked:
    """One request: what came, and how long it took."""

    tokens: list[int]
    ms: float


Prompts = list[list[int]]


def prompts(seed: int, count: int) -> Prompts:
    """``count`` prompts, QUERIES of each story; other stories for another seed."""
    found: Prompts = []
    for story in range(-(-count // QUERIES)):
        batch = csmqar.make_batch(csmqar.held_out_rng(1000 * seed + story), 1, FACTS, QUERIES)
        tokens = batch.tokens[0]
        context = tokens[: FACTS.context_tokens].tolist()
        found += [context + tokens[at - 2 : at + 1].tolist() for at in batch.answer_positions]
    return found[:count]


def requests_of(seed: int, count: int) -> int:
    """How many requests the part with the prompts of a seed has, if most have ``count``."""
    return max(10, count // 5) if seed in (WITHOUT, COLD) else count


def plain_answers(all_prompts: Prompts, log: Path) -> dict[str, list[int]]:
    """The truth: one engine without a connector, one prompt at a time."""
    with Engine(
        MODEL, log=log, kv_cache_gib=0.25, start_timeout_s=300.0, forked=True, **ENGINE
    ) as engine:
        return {
            key_of(prompt): engine.generate([prompt], max_tokens=ANSWER_TOKENS)[0].token_ids
            for prompt in all_prompts
        }


def key_of(prompt: Sequence[int]) -> str:
    """A prompt as a name."""
    return " ".join(map(str, prompt))


class Cluster:
    """Engines, router and server. ``start`` and ``kill`` are for the server alone."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._port = free_port()
        url = f"http://127.0.0.1:{self._port}"
        config = connector_config(None, url=url, load="always", stall_ms=STALL_MS)
        self.engines = [
            stack.enter_context(
                VllmServer(MODEL, *WORDS, kv_transfer_config=config, log=folder / f"vllm{i}.log")
            )
            for i in range(4)
        ]
        self._server: ServerProcess | None = None
        self._hits: dict[str, float] = {}

    def wait(self) -> None:
        """Wait for the engines, which have begun to start, and put the router before them."""
        for engine in self.engines:
            engine.wait()
        roles = ("prefill", "prefill", "decode", "decode")
        workers = [f"{one.url}={role}" for one, role in zip(self.engines, roles, strict=True)]
        self.router = self._stack.enter_context(
            RouterProcess(workers, log=self._folder / "router.log")
        )
        self.router.wait(len(workers))

    def start(self) -> None:
        """Start the store's server, or start it again."""
        if self._server is None:
            self._server = self._stack.enter_context(
                ServerProcess(
                    self._folder / "store",
                    "--memory=512MiB",
                    "--disk=1GiB",
                    log=self._folder / "server.log",
                    port=self._port,
                )
            )
        else:
            self._server.start()

    def kill(self) -> None:
        """End the server with SIGKILL."""
        assert self._server is not None
        self._server.kill()

    def swap(self) -> None:
        """Prefill engines decode and decode engines prefill from now on."""
        for worker in self.router.ask("GET", "/v1/workers")["workers"]:
            role = "decode" if worker["role"] == "prefill" else "prefill"
            self.router.ask("PATCH", f"/v1/workers/{worker['name']}", {"role": role})

    def take_away_and_add(self) -> None:
        """Take one of the decode engines away; then it comes as a new one."""
        url = self.engines[0].url
        name = url.removeprefix("http://")
        self.router.ask("DELETE", f"/v1/workers/{name}")
        self.router.ask("POST", "/v1/workers", {"url": url, "role": "decode"})

    def hit_tokens(self) -> float:
        """Prompt tokens that engines have claimed from the store; of dead ones, as last seen."""
        for engine in self.engines:
            if engine.alive:
                with urllib.request.urlopen(f"{engine.url}/metrics", timeout=10) as page:
                    text = page.read().decode()
                found = re.findall(r"^prefixstore:tokens_hit_total\{.*\} (\S+)$", text, re.M)
                self._hits[engine.url] = sum(map(float, found))
        return sum(self._hits.values())


async def ask_all(
    url: str,
    wanted: Prompts,
    concurrency: int,
    params: dict[str, Any] | None = None,
    midway: Callable[[], None] | None = None,
) -> list[Asked]:
    """Ask in order, so many at once; ``midway`` is called when half of the answers are there."""
    limit, done = asyncio.Semaphore(concurrency), 0
    results: list[Asked | None] = [None] * len(wanted)

    async def one(session: ClientSession, i: int) -> None:
        nonlocal done
        body: dict[str, Any] = {
            "model": str(MODEL), "prompt": wanted[i], "max_tokens": ANSWER_TOKENS,
            "temperature": 0, "return_token_ids": True,
        }  # fmt: skip
        if params is not None:
            body["kv_transfer_params"] = params
        async with limit:
            began = time.monotonic()
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                told = await answer.json()
            if not answer.ok:
                raise RuntimeError(f"{answer.status}: {told}")
            ms = 1000 * (time.monotonic() - began)
            results[i] = Asked(told["choices"][0]["token_ids"], ms)
        done += 1
        if midway is not None and done == len(wanted) // 2:
            await asyncio.get_running_loop().run_in_executor(None, midway)

    async with ClientSession(timeout=ClientTimeout(total=REQUEST_S)) as session:
        await asyncio.gather(*(one(session, i) for i in range(len(wanted))))
    return [result for result in results if result is not None]


class Run:
    """The parts, one after the other, and what each has shown."""

    def __init__(self, cluster: Cluster, truth: dict[str, list[int]], count: int) -> None:
        self._cluster, self._truth, self._count = cluster, truth, count
        self.rows: list[dict[str, object]] = []
        self.wrong = 0
        self._back_s = float("nan")

    def part(
        self, name: str, seed: int, *, concurrency: int = CONCURRENCY, **how: Any
    ) -> list[Asked]:
        """Ask the prompts of a seed through the router, compare, note."""
        wanted = prompts(seed, requests_of(seed, self._count))
        before = self._cluster.hit_tokens()
        asked = asyncio.run(ask_all(self._cluster.router.url, wanted, concurrency, **how))
        wrong = len(wanted) - len(asked)
        for prompt, one in zip(wanted, asked, strict=True):
            wrong += one.tokens != self._truth[key_of(prompt)]
        ms = spread([one.ms for one in asked])
        self.rows.append(
            {"part": name, "requests": len(wanted), "wrong": wrong, "median_ms": ms["median"],
             "max_ms": ms["max"], "hit_tokens": self._cluster.hit_tokens() - before}
        )  # fmt: skip
        self.wrong += wrong
        return asked

    def all_parts(self) -> list[Bar]:
        """The whole story."""
        cluster = self._cluster
        self.part("engines without a server", WITHOUT)
        cluster.start()
        time.sleep(2.0)  # engines look for a server once a second
        self.part("2 prefill, 2 decode", 2)
        hits = float(str(self.rows[-1]["hit_tokens"]))
        self.part("roles swapped", 3, midway=cluster.swap)
        self.part("a decode engine taken away, added", 7, midway=cluster.take_away_and_add)
        self.part("a prefill engine killed", 4, midway=cluster.engines[2].kill)
        cold = self.part("one at a time, no store", COLD, concurrency=1, params=BYPASS)
        restart = threading.Thread(target=self._restart)
        during = self.part("one at a time, server killed", 6, concurrency=1, midway=restart.start)
        restart.join()
        extra = max(one.ms for one in during) - spread([one.ms for one in cold])["median"]
        return [
            Bar("wrong or missing answers", self.wrong, 0, "=="),
            Bar("prompt tokens from the store, of those prefilled elsewhere",
                hits / (self._count * (FACTS.context_tokens // 64) * 64), 0.9, ">="),
            Bar("worst extra latency around the restart, ms", extra, EXTRA_MS_MAX, "<="),
            Bar("hits are back after the restart, s", self._back_s, BACK_S_MAX, "<="),
        ]  # fmt: skip

    def _restart(self) -> None:
        """Kill the server, start it again, and wait for the first hit."""
        cluster = self._cluster
        cluster.kill()
        time.sleep(DOWN_S)
        cluster.start()
        began, before, known = time.monotonic(), cluster.hit_tokens(), prompts(2, QUERIES)
        while cluster.hit_tokens() == before and time.monotonic() - began < 10 * BACK_S_MAX:
            asyncio.run(ask_all(cluster.router.url, known, 1))
        self._back_s = time.monotonic() - began


def run(count: int, folder: Path) -> tuple[Run, list[Bar]]:
    """Everything, with the store and the logs in ``folder``. Raises RuntimeError, OSError."""
    sets = [prompts(seed, requests_of(seed, count)) for seed in range(1, 8)]
    with ExitStack() as stack:
        cluster = Cluster(folder, stack)  # starts while the truth is computed
        truth = plain_answers([prompt for one in sets for prompt in one], folder / "plain.log")
        cluster.wait()
        parts = Run(cluster, truth, count)
        return parts, parts.all_parts()


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disaggregated")
    parser.add_argument("--requests", type=int, default=50, metavar="N", help="of each part")
    args = add_arguments(parser).parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prefixstore-disaggregated-"))
    try:
        parts, bars = run(args.requests, folder)
    finally:
        forget_memory(folder / "store")
        shutil.rmtree(folder, ignore_errors=True)
    report("2 prefill and 2 decode engines behind one server", parts.rows, bars, args)


if __name__ == "__main__":
    main()
