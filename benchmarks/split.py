"""A tier about as fast as computing: ms to the first token, loaded, computed, or both at once.

``python -m benchmarks.split [--json] [--check] [--quick] [--model DIR] [--tokens 2048]
[--prompts 4] [--rounds 2] [--rates 2 1 0.5]``

Real vLLM on whatever it runs on; ``--model`` as for `benchmarks.prefix`. All chunks are on disk
only, in the page cache, and reads are slowed in the engine's process (`split_tier`) to ``--rates``
times what the engine computes, as measured just before. Each prompt is asked without the store,
which is cold, and with each ``load`` setting, by turns; all of them once before a rate is measured,
for settings that go by measurements to have some.

What must hold: every first token is that of the cold run; with ``load: both`` no answer is later
than a cold one, but for what slices cost, and it comes before both others where rates are alike.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engine import Engine
from benchmarks.engine_model import add_graphs, chosen_model, graphs, store_folder
from benchmarks.engine_process import connector_config
from benchmarks.prefix import CHUNK_TOKENS, Setting, keep_on_disk_only, setting_for
from benchmarks.prefix_bench import BEHIND_TOKENS, Bench
from benchmarks.restart import Results
from benchmarks.slow_tier import COLD, ask
from benchmarks.split_tier import NAMED, POLICIES, Told
from benchmarks.store_peers import fill_page_cache
from benchmarks.table import Bar, add_arguments, report
from prefixstore import Store

CASES = (COLD, *POLICIES)
LATER_MAX = 1.15  # of cold: computing in slices takes longer
STALL_MS = 60_000


def by_turns(
    engine: Engine,
    told: Told,
    prompts: Sequence[list[int]],
    rounds: int = 1,
    bytes_s: float | None = None,
) -> Results:
    """Every prompt in every way: others may use the machine, now more, now less. Each setting gets
    to see what computing takes."""
    results = Results(CASES)
    for number, prompt in list(enumerate(prompts)) * rounds:
        for case in CASES:
            told.tell(POLICIES[number % len(POLICIES)] if case == COLD else case, bytes_s)
            results.add(case, number, ask(engine, prompt, cold=case == COLD))
    return results


def measure(
    setting: Setting, tokens: int, prompts: int, rounds: int, rates: Sequence[float]
) -> dict[float, Results]:
    """An engine that stores, and one that is asked."""
    bench = Bench([tokens], prompts, 0)
    asked, told = bench.prompts[tokens], Told(setting.folder)
    with setting.engine("storing") as engine:
        bench.fill(engine, cold=False)
    keep_on_disk_only(setting.folder)
    fill_page_cache(setting.folder.glob("*.slots"))
    with Store.open(setting.folder, create=False) as store:
        [record] = store.namespaces()
    token_bytes = record.layout.payload_bytes / record.layout.chunk_tokens
    config = connector_config(
        setting.folder, memory=setting.store_bytes, disk=setting.disk_bytes, load="both",
        save=False, stall_ms=STALL_MS,
    )  # fmt: skip
    found = {}
    print("engine for all cases ...", file=sys.stderr, flush=True)
    kv = {**config, **NAMED}
    with Engine(setting.model, kv_transfer_config=kv, **setting.arguments) as engine:
        by_turns(engine, told, asked)
        last = by_turns(engine, told, asked)
        for rate in rates:
            for count in (1, rounds):  # the machine's mood may change between
                cold_ms = last.median(COLD)
                assert cold_ms is not None
                tokens_s = (tokens + BEHIND_TOKENS) / cold_ms * 1000
                last = by_turns(engine, told, asked, count, rate * tokens_s * token_bytes)
            found[rate] = last
    return found


def bars(found: dict[float, Results]) -> list[Bar]:
    """What must be reached."""
    differing = sum(sum(results.differing.values()) for results in found.values())
    made = [Bar("first tokens that differ from the cold run's", differing, 0, "==")]
    for rate, results in found.items():
        cold, always, _, both = (results.median(case) for case in CASES)
        later = both / cold if both and cold else None
        made.append(Bar(f"rate {rate:g}: both / {COLD}", later, LATER_MAX, "<="))
        if rate == 1:
            least = both / min(cold, always) if both and cold and always else None
            made.append(Bar(f"rate {rate:g}: both / the better of {COLD}, always", least, 1.0, "<"))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.split")
    add_arguments(parser)
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke test")
    add("--model", type=Path, help="a folder; without one a small model is made")
    add("--tokens", type=int, default=2048, help="of each prompt")
    add("--prompts", type=int, default=4)
    add("--rounds", type=int, default=2, help="that each is asked at each rate")
    add("--rates", type=float, nargs="+", default=[2.0, 1.0, 0.5], help="the highest first")
    add("--store-gib", type=int, default=1, help="size of each tier")
    add_graphs(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.prompts, args.rounds, args.tokens, args.rates = 2, 1, 512, [1.0]
    tokens = args.tokens // CHUNK_TOKENS * CHUNK_TOKENS
    model, given = chosen_model(args.model, 0.5, 24.0)
    given |= graphs(args)
    if args.model is None:
        given |= {"block_size": CHUNK_TOKENS}  # on a CPU it is larger, and chunks with it
    with store_folder() as folder:
        size = args.store_gib << 30
        setting = setting_for(tokens, model, folder, size, given, size)
        found = measure(setting, tokens, args.prompts, args.rounds, args.rates)
    rows = [{"rate": rate, **row} for rate, results in found.items() for row in results.rows()]
    title = f"{tokens} tokens from a tier as slow as computing, ms to the first token"
    report(title, rows, [] if args.quick else bars(found), args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
