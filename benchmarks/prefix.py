"""Exact prefixes of many thousand tokens: ms to the first token, beside vLLM's own ways.

``python -m benchmarks.prefix [--json] [--check] [--quick] [--model DIR] [--tokens N ...]
[--prompts 4] [--rounds 3] [--disk [--dir FOLDER]] [--peer native] [--peer lmcache]``

Real vLLM on whatever it runs on; ``--model`` may be a folder with nothing but a config.json, which
gives a model of that shape with random weights: enough for every time. Without it a small model is
made. Prompts are asked cold, then, once they are stored, from vLLM's own prefix cache (the floor)
and, with that emptied before each round, from the memory tier; then the engine is killed (SIGKILL)
and another one asked. With ``--disk`` the memory tier is emptied then, and kept empty, and the next
engine has all from the slot file: in the page cache, and not in there; the last may also compute
what is faster to compute (``load: auto``, the default). ``--peer native`` asks vLLM's
OffloadingConnector as well, ``--peer lmcache`` LMCache from its server's memory (`lmcache_peer`). A
peer that fails is a line of the table with the reason.

What must hold: every first token is that of the cold run (a peer's are only counted, and ours where
``--codec`` rounds); every hit is of the whole prompt, but for that last engine's.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import Answer, Engine
from benchmarks.engine_model import add_codec, add_graphs, chosen_model, graphs, store_folder
from benchmarks.engine_process import connector_config, native_config
from benchmarks.lmcache_peer import lmcache_engine
from benchmarks.restart import Results, Row, forget
from benchmarks.store_peers import drop_page_cache, fill_page_cache
from benchmarks.table import Bar, add_arguments, report, told_so_far
from prefixstore import Store, admin
from prefixstore.codec import NONE
from prefixstore.ledger import MEMORY as MEMORY_TIER

COLD, OWN = "cold", "vLLM's own prefix cache"
MEMORY, KILLED = "memory tier", "memory tier, after kill -9 and restart"
FIRST = "the same, each prompt's first time"  # after the restart
DISK, DISK_COLD = "disk tier, page cache", "disk tier, cold"
DISK_AUTO = "disk tier, cold, as much as is worth it"
NATIVE, LMCACHE = "OffloadingConnector, CPU", "LMCache, memory of its server"
PEERS = {"native": NATIVE, "lmcache": LMCACHE}
CASES = (COLD, OWN, MEMORY, KILLED, FIRST, DISK, DISK_COLD, DISK_AUTO, *PEERS.values())
CHUNK_TOKENS, LMCACHE_CHUNK_TOKENS, LMCACHE_FULL = 64, 256, 0.8  # it evicts when so full
# Behind the last chunk, for everyone to compute. Of a whole block of 16 tokens, who keeps blocks
# would compute the last token only, which is a decode graph.
BEHIND_TOKENS = 15
STEP_TOKENS, VOCAB = 8192, 1000
DEADLINE_S = 120.0
PASSES_MAX = 8  # until all of a prompt is stored: saves that find no room are dropped


class Bench:
    """Prompts, and what was said to them."""

    def __init__(self, lengths: Sequence[int], prompts: int, rounds: int) -> None:
        self._rounds, chosen = rounds, random.Random(7)
        self.prompts = {
            count: [
                chosen.choices(range(1, VOCAB), k=count + BEHIND_TOKENS) for _ in range(prompts)
            ]
            for count in lengths
        }
        self.results = {count: Results(CASES) for count in lengths}
        self.failed: dict[str, str] = {}  # a peer's case: why

    def fill(self, engine: Engine, hits: str, *, keep: bool) -> None:
        """Ask the prompts of each length until all are stored, then for them, as the case ``hits``.
        ``keep``: cold, and from vLLM's own prefix cache, too."""
        chosen = random.Random(8)
        for count, prompts in self.prompts.items():
            ask(engine, chosen.choices(range(1, VOCAB), k=count))  # kernels are compiled
            forget(engine)
            for number, prompt in enumerate(prompts):
                answer = ask(engine, prompt)
                if keep:
                    self.results[count].add(COLD, number, answer)
            store_all(engine, prompts, count)
            for number, prompt in enumerate(prompts if keep else ()):
                ask(engine, prompt)  # perhaps the store's hit
                for _ in range(self._rounds):
                    self.results[count].add(OWN, number, ask(engine, prompt))
            self.hits(engine, hits, [count])

    def hits(
        self, engine: Engine, case: str, lengths: Sequence[int],
        before: Callable[[], None] = lambda: None,
        *,
        whole: bool = True, first: str | None = None,
    ) -> None:  # fmt: skip
        """Ask again, vLLM's own prefix cache emptied before each round; ``before`` each prompt. The
        first round warms what it needs, and counts as the case ``first`` if at all."""
        for count in lengths:
            for round_number in range(self._rounds + 1):
                forget(engine)
                for number, prompt in enumerate(self.prompts[count]):
                    before()
                    answer = ask(engine, prompt)
                    if whole and (answer.cached_tokens or 0) < count:
                        raise RuntimeError(
                            f"{case}: {answer.cached_tokens} of {count} tokens were found; if the "
                            "store is too small for all prompts, give it more (--store-gib)"
                        )
                    counts_as = case if round_number else first
                    if counts_as is not None:
                        self.results[count].add(counts_as, number, answer)

    def rows(self) -> list[Row]:
        """One line a length and case, and one for each peer that failed."""
        rows: list[Row] = [
            {"tokens": n, **row} for n, found in self.results.items() for row in found.rows()
        ]
        failed = [f"{case} failed: {why}" for case, why in self.failed.items()]
        return rows + [{**dict.fromkeys(rows[0]), "case": line} for line in failed]

    def bars(self, peers: Sequence[str], *, exact: bool = True) -> list[Bar]:
        """What must be reached; with peers, also beside the cases of those that did not fail.
        ``exact``: nothing was rounded."""
        differing = sum(
            count
            for found in self.results.values()
            for case, count in found.differing.items()
            if case not in PEERS.values()
        )
        bars = []
        if exact:
            bars.append(Bar("first tokens that differ from the cold run's", differing, 0, "=="))
        for count, found in self.results.items():
            auto, cold = found.median(DISK_AUTO), found.median(COLD)
            if auto and cold:
                bars.append(Bar(f"{count} tokens: {DISK_AUTO} / {COLD}", auto / cold, 1.03, "<="))
        beside = map(PEERS.__getitem__, peers)
        for theirs, (count, found) in itertools.product(beside, self.results.items()):
            for case in (MEMORY, KILLED):
                ours, other = found.median(case), found.median(theirs)
                ratio = ours / other if ours and other else None
                bars.append(Bar(f"{count} tokens: {case} / {theirs}", ratio, 1.0, "<="))
        return bars


def ask(engine: Engine, prompt: list[int]) -> Answer:
    """One token, and the engine at rest."""
    [answer] = engine.generate([prompt], max_tokens=1, timeout_s=DEADLINE_S)
    engine.settle()
    return answer


def store_all(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> None:
    """Ask for prompts until so many leading tokens of each are stored. Raises RuntimeError."""
    for _ in range(PASSES_MAX):
        time.sleep(1.0)
        forget(engine)
        found = [ask(engine, prompt).cached_tokens or 0 for prompt in prompts]
        if min(found) >= tokens:
            return
    raise RuntimeError(f"of prompts of {len(prompts[0])} tokens only {found} are stored")


@dataclass(frozen=True)
class Setting:
    """What engines are started with, and the folder of their store."""

    model: Path
    folder: Path
    store_bytes: int
    disk_bytes: int
    arguments: dict[str, Any]
    codec: str = NONE

    @contextmanager
    def engine(self, name: str, load: str = "always") -> Iterator[Engine]:
        """One with the store; it ends by SIGKILL."""
        config = connector_config(
            self.folder, memory=self.store_bytes, disk=self.disk_bytes, load=load, stall_ms=5000,
            staging="2GiB", codec=self.codec,
        )  # fmt: skip
        print(f"engine for {name} ...", file=sys.stderr, flush=True)
        with Engine(self.model, kv_transfer_config=config, **self.arguments) as engine:
            yield engine
            engine.kill()


def setting_for(
    longest: int,
    model: Path,
    folder: Path,
    store_bytes: int,
    given: dict[str, Any],
    disk_bytes: int = 0,
) -> Setting:
    """For prompts of so many tokens at most, behind which a few are asked."""
    arguments: dict[str, Any] = {
        "max_model_len": longest + 2 * BEHIND_TOKENS, "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": 4, "enable_prefix_caching": True, **given,
    }  # fmt: skip
    return Setting(model, folder, store_bytes, disk_bytes, arguments)


def measure(bench: Bench, setting: Setting, *, peers: Sequence[str]) -> None:
    """An engine, one after it was killed, two that have the disk only, and one with each peer."""
    lengths = list(bench.prompts)
    with setting.engine(MEMORY) as engine:
        bench.fill(engine, MEMORY, keep=True)
    with setting.engine(KILLED) as engine:
        bench.hits(engine, KILLED, lengths, first=FIRST)
    if setting.disk_bytes:
        keep_on_disk_only(setting.folder)
        with setting.engine(DISK) as engine:
            fill_page_cache(setting.folder.glob("*.slots"))
            bench.hits(engine, DISK, lengths)
            bench.hits(engine, DISK_COLD, lengths, lambda: _cool(setting))
        with setting.engine(DISK_AUTO, "auto") as engine:
            bench.hits(engine, DISK_AUTO, lengths, lambda: _cool(setting), whole=False)
    for name in peers:
        case = PEERS[name]
        print(f"engine with {case} ...", file=sys.stderr, flush=True)
        try:
            with peer_engine(name, setting) as engine:
                bench.fill(engine, case, keep=False)
        except (RuntimeError, OSError, ValueError) as error:  # what was measured is not lost
            print(f"{case} failed: {error}", file=sys.stderr, flush=True)
            bench.failed[case] = str(error).partition("\n")[0]


@contextmanager
def peer_engine(name: str, setting: Setting) -> Iterator[Engine]:
    """One with a peer of ours, which has as much memory. Raises EngineDied, RuntimeError."""
    if name == "native":
        native = native_config(setting.store_bytes)
        with Engine(setting.model, kv_transfer_config=native, **setting.arguments) as engine:
            yield engine
        return
    gib = setting.store_bytes / LMCACHE_FULL / (1 << 30)
    with (
        tempfile.TemporaryDirectory(prefix="prefixstore-bench-") as logs,
        lmcache_engine(
            setting.model, Path(logs), "--l1-size-gb", f"{gib:g}", **setting.arguments
        ) as engine,
    ):
        yield engine


def keep_on_disk_only(folder: Path) -> None:
    """Have all chunks on disk, none in memory, and none brought there when it is read."""
    with Store.open(folder, create=False) as store:
        names = {chunk.row.namespace for chunk in admin.list_chunks(store)}
        admin.empty_memory(store, DEADLINE_S)
        for name in names:
            store.quotas.set(MEMORY_TIER, 0, namespace=name)


def _cool(setting: Setting) -> None:
    drop_page_cache(setting.folder.glob("*.slots"))


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Which prompts, of which model, and how large a store."""
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--model", type=Path, help="a folder; without one a small model is made")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of the prompts")
    parser.add_argument("--prompts", type=int, default=4, help="of each length")
    parser.add_argument("--rounds", type=int, default=3, help="that each is asked again")
    parser.add_argument("--store-gib", type=int, default=1, help="size of the memory tier")
    add_graphs(parser)


def bench_of(args: argparse.Namespace) -> tuple[Bench, list[int]]:
    """What `add_prompts` asked for, and the lengths, in whole chunks."""
    if args.quick:
        args.tokens, args.prompts, args.rounds = [256], 2, 1
    lengths = [count // CHUNK_TOKENS * CHUNK_TOKENS for count in args.tokens]
    bench = Bench(lengths, args.prompts, args.rounds)
    return bench, lengths


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix")
    add_arguments(parser)
    add_prompts(parser)
    add_codec(parser)
    parser.add_argument("--disk", action="store_true", help="measure the disk tier, too")
    parser.add_argument("--dir", type=Path, help="where the store's folder goes; for --disk")
    parser.add_argument(
        "--peer", choices=PEERS, action="append", default=[],
        help="measure this, too: vLLM's own offloading (on a GPU), LMCache",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if "native" in args.peer and not torch.cuda.is_available():
        parser.error("--peer native: vLLM's OffloadingConnector needs a GPU; leave it out")
    if "lmcache" in args.peer and any(count % LMCACHE_CHUNK_TOKENS for count in args.tokens):
        parser.error(f"--peer lmcache: --tokens must be multiples of {LMCACHE_CHUNK_TOKENS}")
    model, given = chosen_model(args.model, 0.5, 24.0)
    given |= graphs(args)
    bench, lengths = bench_of(args)
    title = "exact prefixes, ms to the first token"
    with told_so_far(title, bench.rows), store_folder(args.dir) as folder:
        store_bytes = args.store_gib << 30
        disk_bytes = store_bytes if args.disk else 0
        setting = setting_for(max(lengths), model, folder, store_bytes, given, disk_bytes)
        measure(bench, replace(setting, codec=args.codec), peers=args.peer)
    bars = [] if args.quick else bench.bars(args.peer, exact=args.codec == NONE)
    report(title, bench.rows(), bars, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
