"""The simulation of `benchmarks.scale` beside real engines: the same requests, at the same times.

``python -m benchmarks.scale_real [--json] [--check] [--engines N ..] [--requests N] [--load X]``

vLLM servers on this machine's CPU with the connector and one store, behind `prefixstore route`.
First the costs of one engine are measured, one request at a time; nothing else is fitted. Then
conversations of the trace ``chat`` are asked, at random times, round robin and by prefix, without
the store and with it, and the simulation is given the same requests. Caches are as good as empty
before each: every way has a salt of its own. How much slower the machine was than when costs were
measured is taken from single prompts before and after: ``slowdown`` is in all simulated times.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout

from benchmarks.demo import forget_memory
from benchmarks.engine_process import connector_config
from benchmarks.model import demo_text, make_model
from benchmarks.route import REQUEST_S, Sizes, Workers, ask
from benchmarks.scale import Arrivals, arrivals
from benchmarks.scale_costs import Costs, Curve
from benchmarks.scale_fleet import Fleet
from benchmarks.scale_run import Run
from benchmarks.table import Bar, add_arguments, report
from benchmarks.traces import make_trace
from prefixstore.config import GIB

UNIT_TOKENS, MODEL_LEN, BLOCKS, VOCAB = 64, 4096, 160, 1024
KV_BYTES = 4 * 2 * 4 * 64 * 4  # layers, K and V, KV heads, their size, float32
LENGTHS, PROBE_TOKENS, ROUNDS = (448, 1024, 2048, 3072), 1024, 5
WAYS = (("robin", False), ("robin", True), ("prefix", False), ("prefix", True))
NO_STORE = {"prefixstore": {"read": False, "write": False}}
HIT_ERROR_MAX, TTFT_ERROR_MAX = 0.05, 0.35
WORDS = (
    "--dtype=float32", f"--block-size={UNIT_TOKENS}", f"--max-model-len={MODEL_LEN}",
    f"--max-num-batched-tokens={MODEL_LEN}", "--max-num-seqs=16", "--enforce-eager",
    "--enable-prefix-caching", "--served-model-name=m", "--kv-cache-memory-bytes=134217728",
    "--enable-prompt-tokens-details",
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """Of requests: seconds to the first token, and how many tokens of prompts were cached."""

    seconds: list[float]
    hit_tokens: int
    tokens: int

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.tokens


def tokens_of(units: Sequence[int]) -> list[int]:
    """Token ids that stand for units: equal ones for equal units."""
    found: list[int] = []
    for unit in units:
        found += random.Random(f"unit/{unit}").choices(range(1, VOCAB), k=UNIT_TOKENS)
    return found


async def asked(url: str, prompts: Sequence[tuple[float, list[int], str | None]], salt: str,
                store: bool) -> Seen:  # fmt: skip
    """Ask each prompt at its time, of that worker if one is named."""
    more: dict[str, Any] = {"cache_salt": salt}
    if not store:
        more["kv_transfer_params"] = NO_STORE
    async with ClientSession(timeout=ClientTimeout(total=REQUEST_S)) as session:

        async def one(at_s: float, tokens: list[int], to: str | None) -> tuple[float, int]:
            await asyncio.sleep(at_s)
            told, ms = await ask(session, url, tokens, 1, to, **more)
            details = told["usage"].get("prompt_tokens_details") or {}
            return ms / 1000, int(details.get("cached_tokens") or 0)

        found = await asyncio.gather(*(one(*given) for given in prompts))
    return Seen(
        [seconds for seconds, _ in found],
        sum(hits for _, hits in found),
        sum(len(tokens) for _, tokens, _ in prompts),
    )


def measure(urls: Sequence[str], seed: int) -> tuple[Costs, Costs]:
    """What prompts cost an engine of the first URL: without the store, and with it.

    Straight lines, by medians: on a machine that others use, a parabola through a few times is one
    through their noise, and attention is a small part of what this model computes.
    """
    took: dict[str, list[tuple[int, float]]] = {
        name: [] for name in ("cold", "own", "saved", "memory")
    }
    for one in range(-1, ROUNDS):  # the first round is not counted
        for length in LENGTHS:
            salt = f"measure {seed} {length} {one}"
            prompt = [(0.0, tokens_of(range(length // UNIT_TOKENS)), None)]
            for name, url, key, store in (
                ("cold", urls[0], salt, False), ("own", urls[0], salt, False),
                ("saved", urls[1], salt + "s", True), ("memory", urls[0], salt + "s", True),
            ):  # fmt: skip
                [seconds] = asyncio.run(asked(url, prompt, key, store)).seconds
                if one >= 0:
                    took[name].append((length, seconds))
                if name == "saved":
                    asyncio.run(asyncio.sleep(0.2))  # until it is stored
    return costs_of(took)


def costs_of(took: dict[str, list[tuple[int, float]]]) -> tuple[Costs, Costs]:
    """Of the tokens and seconds of single prompts, by where they came from."""
    own_s = statistics.median(seconds for _, seconds in took["own"])
    cold, saved, load = (
        max(1e-9, statistics.median((seconds - own_s) / tokens for tokens, seconds in took[name]))
        for name in ("cold", "saved", "memory")
    )
    line = Curve((cold, own_s))
    plain = Costs(
        kv_bytes=KV_BYTES, cold=line, floor=Curve((own_s,)), blend=line, step_s=own_s,
        answer_token_s=0.0, load_bytes_s=KV_BYTES / load, save_bytes_s=1e9, pool_get_bytes_s=1e9,
        pool_put_bytes_s=1e9, pool_lookup_s=0.0,
    )  # fmt: skip
    return plain, replace(plain, cold=Curve((saved, own_s)))


def slowdown(url: str, plain: Costs, salt: str) -> list[float]:
    """Times of single prompts that are in no cache, over the measured ones."""
    tokens = tokens_of(range(PROBE_TOKENS // UNIT_TOKENS))
    return [
        asyncio.run(asked(url, [(0.0, tokens, None)], f"{salt} {one}", False)).seconds[0]
        / plain.cold(PROBE_TOKENS)
        for one in range(ROUNDS)
    ]


def slower(costs: Costs, factor: float) -> Costs:
    """The costs of a machine that takes so many times as long."""
    cold, floor = (
        Curve(tuple(factor * term for term in curve.terms)) for curve in (costs.cold, costs.floor)
    )
    load = costs.load_bytes_s / factor
    return replace(costs, cold=cold, floor=floor, step_s=factor * costs.step_s, load_bytes_s=load)


def trace_of(fleet: Fleet, requests: int, seed: int) -> Arrivals:
    """Conversations whose answers are part of the next prompt only: an engine here gives others."""
    found = []
    for request in make_trace("chat", seed, 40 * requests):
        prompt = request.path[: request.prompt_chunks]
        if len(prompt) * UNIT_TOKENS < MODEL_LEN:
            found.append(replace(request, path=prompt))
    return arrivals(found[:requests], fleet, seed)


def real(workers: Workers, fleet: Fleet, given: Arrivals, folder: Path, salt: str) -> Seen:
    """Ask for it."""
    names = workers.names
    prompts = [
        (at_s, tokens_of(request.path), names[n % len(names)] if fleet.routing == "robin" else None)
        for n, (at_s, request) in enumerate(given)
    ]
    with workers.router(folder, hears=True) as router:
        router.wait(len(names))
        return asyncio.run(asked(router.url, prompts, salt, fleet.store))


def simulated(fleet: Fleet, costs: Costs, given: Arrivals) -> Seen:
    """Simulate it."""
    totals = Run(fleet, costs, given, 0).run()
    units = totals.units
    hits = sum(units.values()) - units["computed"]
    tokens = sum(units.values()) * UNIT_TOKENS
    return Seen(totals.ttft_s, hits * UNIT_TOKENS, tokens)


def compare(
    count: int, requests: int, load: float, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """All ways on so many engines. Raises RuntimeError, OSError."""
    rows = []
    model = make_model(None, text=demo_text(), vocab=VOCAB, max_len=MODEL_LEN)
    config = connector_config(folder / "store", memory="1GiB", disk="0")
    with ExitStack() as stack:
        sizes = Sizes(workers=count, blocks=BLOCKS + 1)  # one is never given out
        workers = Workers(sizes, folder, stack, model, WORDS, config)
        plain, saved = measure([spec["url"] for spec in workers.specs], seed)
        whole_s = plain.cold(1200) / 1200 * UNIT_TOKENS  # of a unit, were nothing cached
        base = Fleet(
            engines=count, host_engines=count, unit_tokens=UNIT_TOKENS, answer_tokens=0,
            gpu_cache_gib=BLOCKS * UNIT_TOKENS * KV_BYTES / GIB, memory_gib=1, disk_gib=0,
            pool_nodes_per_host=0, tokens_s=load * UNIT_TOKENS / whole_s,
        )  # fmt: skip
        for routing, store in WAYS:
            fleet = replace(base, routing=routing, store=store)
            given = trace_of(fleet, requests, seed)
            url, salt = workers.servers[0].url, f"{routing} {store}"
            probes = slowdown(url, plain, f"before {salt}")
            was = real(workers, fleet, given, folder, salt)
            factor = statistics.mean(probes + slowdown(url, plain, f"after {salt}"))
            told = simulated(fleet, slower(saved if store else plain, factor), given)
            rows.append({**row_of(fleet, was, told), "slowdown": factor})
    return rows


def row_of(fleet: Fleet, was: Seen, told: Seen) -> dict[str, Any]:
    """Real and simulated side by side."""
    row: dict[str, Any] = {
        "engines": fleet.engines, "routing": fleet.routing, "store": fleet.store,
        "requests": len(was.seconds), "hit_rate": was.hit_rate, "hit_simulated": told.hit_rate,
    }  # fmt: skip
    for name, at in (("p50", 0.5), ("p90", 0.9)):
        for what, seen in (("ttft", was), ("simulated", told)):
            ordered = sorted(seen.seconds)
            row[f"{what}_{name}"] = 1000 * ordered[int(at * (len(ordered) - 1))]
        row[f"error_{name}"] = row[f"simulated_{name}"] / row[f"ttft_{name}"] - 1
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale_real")
    parser.add_argument("--engines", type=int, nargs="+", default=[2, 4], help="at least 2")
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument(
        "--load", type=float, default=0.3, help="of what engines could compute without a cache"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = add_arguments(parser).parse_args(argv)
    if min(args.engines) < 2 or args.requests < 1 or args.load <= 0:
        parser.error("--engines takes 2 and more, --requests 1 and more, --load more than 0")
    rows: list[dict[str, Any]] = []
    for count in args.engines:
        folder = Path(tempfile.mkdtemp(prefix="prefixstore-scale-"))
        try:
            rows += compare(count, args.requests, args.load, args.seed, folder)
        finally:
            forget_memory(folder / "store")
            shutil.rmtree(folder, ignore_errors=True)
    worst = max(abs(row["hit_rate"] - row["hit_simulated"]) for row in rows)
    late = max(abs(row["error_p50"]) for row in rows)
    bars = [
        Bar("hit rate, simulated - real, at most", worst, HIT_ERROR_MAX, "<="),
        Bar("median to the first token, simulated / real - 1", late, TTFT_ERROR_MAX, "<="),
    ]
    report("Scale: simulated and real", rows, bars, args)


if __name__ == "__main__":
    main()
