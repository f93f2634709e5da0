"""A disk that is slower than computing: ms to the first token beside those of a cold prompt.

``python -m benchmarks.slow_tier [--json] [--check] [--quick] [--prompts 10] [--tokens 2048]
[--times 4]``

Real vLLM with the connector's default, ``load: auto``. All chunks are on disk only. An engine
loads each prompt from there; then the disk gets so slow that loading takes ``--times`` as long as
computing (`fault_shim` slows the engine's reads), and each prompt is asked twice: without the
store, which is cold, and with it. A new engine, which has measured nothing, is asked the same, the
other way round: what it is asked for first is stored. The shim needs a C compiler.

What must hold: every first token is that of the cold run; a prompt that is stored on a slow disk
waits hardly longer than one that is not stored (its bar is of medians; ``max`` is the worst, a
prompt by which a slow disk was found out); that of a new engine's first prompt is higher, for it
finds out.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from benchmarks.engine import Answer, Engine
from benchmarks.engine_model import chosen_model, store_folder
from benchmarks.fault_shim import Shim
from benchmarks.prefix import CHUNK_TOKENS, Setting, keep_on_disk_only, setting_for
from benchmarks.prefix_bench import BEHIND_TOKENS, DEADLINE_S, Bench
from benchmarks.restart import NEVER, Results
from benchmarks.table import Bar, add_arguments, report
from prefixstore import Store, admin

COLD = "cold"
FAST, SLOWED, FROM_START = "as it is", "became slow", "slow, new engine"
FEW_TOKENS = 64  # a step of so few says nothing about prefill
STORE_BYTES = 1 << 30
BAR, BAR_FIRST = 1.1, 1.3


def ask(engine: Engine, prompt: list[int], *, cold: bool = False) -> Answer:
    """One prompt, of which vLLM's own prefix cache has nothing."""
    engine.reset_prefix_cache()
    params = [NEVER if cold else None]
    [answer] = engine.generate(
        [prompt], max_tokens=1, kv_transfer_params=params, timeout_s=DEADLINE_S
    )
    engine.settle()
    return answer


def by_turns(
    engine: Engine, prompts: Sequence[list[int]], disk: str, *, cold_first: bool = True
) -> Results:
    """Every prompt cold and with the store: others may use the machine, now more, now less."""
    results = Results((COLD, disk))
    for number, prompt in enumerate(prompts):
        for cold in (cold_first, not cold_first):
            results.add(COLD if cold else disk, number, ask(engine, prompt, cold=cold))
    return results


def measure(
    setting: Setting, shim: Shim, tokens: int, prompts: int, times: float
) -> dict[str, Results]:
    """An engine that stores, one whose disk becomes slow, and one that finds it slow."""
    bench, found = Bench([tokens], prompts + 1, 0), {}
    with setting.engine("storing") as engine:
        bench.fill(engine, cold=False)
    keep_on_disk_only(setting.folder)
    with Store.open(setting.folder, create=False) as store:
        chunk_bytes = next(admin.list_chunks(store)).row.slot_bytes
    warm, *asked = bench.prompts[tokens]
    with setting.engine(SLOWED, "auto") as engine:
        by_turns(engine, [warm, warm], FAST)
        found[FAST] = by_turns(engine, asked, FAST)
        cold_ms = found[FAST].median(COLD)
        assert cold_ms is not None
        chunk_s = cold_ms / 1000 * CHUNK_TOKENS / (tokens + BEHIND_TOKENS)
        rate = int(chunk_bytes / (times * chunk_s))
        with shim.during(bytes_s=rate):
            found[SLOWED] = by_turns(engine, asked, SLOWED)
    with setting.engine(FROM_START, "auto") as engine:
        ask(engine, warm[:FEW_TOKENS], cold=True)  # kernels are compiled
        with shim.during(bytes_s=rate):
            found[FROM_START] = by_turns(engine, asked, FROM_START, cold_first=False)
    return found


def bars(found: dict[str, Results]) -> list[Bar]:
    """What must be reached."""
    differing = sum(sum(results.differing.values()) for results in found.values())
    made = [Bar("first tokens that differ from the cold run's", differing, 0, "==")]
    for disk in (SLOWED, FROM_START):
        slow, cold = found[disk].median(disk), found[disk].median(COLD)
        made.append(Bar(f"{disk} / {COLD}", slow / cold if slow and cold else None, BAR, "<="))
    slow, cold = (found[FROM_START].answers[case][0].ttft_ms for case in (FROM_START, COLD))
    first = slow / cold if slow and cold else None
    made.append(Bar(f"{FROM_START}, its first prompt / {COLD}", first, BAR_FIRST, "<="))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow_tier")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=2048, help="of each prompt")
    parser.add_argument("--times", type=float, default=4.0, help="loading takes, of computing")
    args = parser.parse_args(argv)
    if args.quick:
        args.prompts, args.tokens = 2, 512
    tokens = args.tokens // CHUNK_TOKENS * CHUNK_TOKENS
    model, given = chosen_model(None, 0.5, 24.0)
    with store_folder() as folder:
        folder.mkdir()
        shim = Shim(folder.parent / "faults", folder)
        given |= {"env": shim.environment, "block_size": CHUNK_TOKENS}
        setting = setting_for(tokens, model, folder, STORE_BYTES, given, STORE_BYTES)
        found = measure(setting, shim, tokens, args.prompts, args.times)
    title = f"a disk that takes {args.times:g} times as long as computing, ms to the first token"
    rows = [{"disk": disk, **row} for disk, results in found.items() for row in results.rows()]
    report(title, rows, [] if args.quick else bars(found), args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
