"""Exact prefixes of many thousand tokens: ms to the first token, beside vLLM's own ways.

``python -m benchmarks.prefix [--json] [--check] [--quick] [--model DIR] [--tokens N ...]
[--prompts 4] [--rounds 3] [--disk [--dir FOLDER]] [--peer native] [--peer lmcache] [--apart]``

Real vLLM on whatever it runs on; ``--model`` may be a folder with nothing but a config.json, which
gives a model of that shape with random weights: enough for every time. Without it a small model is
made. Prompts are asked cold, then, once they are stored, from the memory tier, with vLLM's own
prefix cache emptied before each round, and at once again from that cache (the floor); then the
engine is killed (SIGKILL) and another one asked. With ``--disk`` the memory tier is emptied then,
and kept empty, and the next engine has all from the slot file: in the page cache, and not in there;
the last may also compute what is faster to compute (``load: auto``, the default).

``--peer native`` asks vLLM's OffloadingConnector as well, ``--peer lmcache`` LMCache from its
server's memory (`lmcache_peer`). Their engines run beside ours and take turns with them
(`prefix_bench`), so the GPU must hold them all; with ``--apart`` it holds one at a time, and what
is compared was not measured at one time. A peer that fails is a line of the table with the reason.

What must hold: every first token is that of the cold run (a peer's are only counted, and ours where
``--codec`` rounds); every hit is of the whole prompt, but for that last engine's.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import Engine
from benchmarks.engine_model import add_codec, add_graphs, chosen_model, graphs, store_folder
from benchmarks.engine_process import connector_config, native_config
from benchmarks.lmcache_peer import lmcache_engine
from benchmarks.prefix_bench import (
    BEHIND_TOKENS,
    DEADLINE_S,
    DISK,
    DISK_AUTO,
    DISK_COLD,
    FIRST,
    KILLED,
    MEMORY,
    OWN,
    OWN_KILLED,
    PEERS,
    Bench,
)
from benchmarks.store_peers import drop_page_cache, fill_page_cache
from benchmarks.table import add_arguments, report, told_so_far
from prefixstore import Store, admin
from prefixstore.codec import NONE
from prefixstore.ledger import MEMORY as MEMORY_TIER

CHUNK_TOKENS, LMCACHE_CHUNK_TOKENS, LMCACHE_FULL = 64, 256, 0.8  # it evicts when so full
STEP_TOKENS = 8192
# Of the GPU: so much must be free, or vLLM does not start. The KV cache has a size of its own.
FREE_SHARE = 0.05


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
        "max_num_seqs": 4, "enable_prefix_caching": True, "gpu_memory_utilization": FREE_SHARE,
        **given,
    }  # fmt: skip
    return Setting(model, folder, store_bytes, disk_bytes, arguments)


def measure(bench: Bench, setting: Setting, *, peers: Sequence[str], apart: bool = False) -> None:
    """An engine, and one after it was killed, each beside one with each peer; then two that have
    the disk only. ``apart``: the peers' come last, one by one."""
    with ExitStack() as beside:
        with setting.engine(MEMORY) as engine:
            bench.fill(engine, cold=True)
            others = _peers(bench, setting, () if apart else peers, beside)
            bench.turns({MEMORY: engine, **others}, own=OWN)
        with setting.engine(KILLED) as engine:
            bench.turns({KILLED: engine, **others}, first=FIRST, own=OWN_KILLED)
    if setting.disk_bytes:
        keep_on_disk_only(setting.folder)
        with setting.engine(DISK) as engine:
            fill_page_cache(setting.folder.glob("*.slots"))
            bench.turns({DISK: engine})
            bench.turns({DISK_COLD: engine}, lambda: _cool(setting))
        with setting.engine(DISK_AUTO, "auto") as engine:
            bench.turns({DISK_AUTO: engine}, lambda: _cool(setting), whole=False)
    for name in peers if apart else ():
        with ExitStack() as alone:
            if its := _peers(bench, setting, [name], alone):
                bench.turns(its)


def _peers(
    bench: Bench, setting: Setting, names: Sequence[str], beside: ExitStack
) -> dict[str, Engine]:
    """By their case, those that start and store; they end with ``beside``."""
    engines = {}
    for name in names:
        case = PEERS[name]
        print(f"engine with {case} ...", file=sys.stderr, flush=True)
        with bench.may_fail(case), ExitStack() as its:
            engine = its.enter_context(peer_engine(name, setting))
            bench.fill(engine, cold=False)
            beside.callback(_end, bench, case, its.pop_all())
            engines[case] = engine
    return engines


def _end(bench: Bench, case: str, its: ExitStack) -> None:
    """End a peer's engine, which hears of what it failed at: it tells the end of its logs then."""
    error = bench.failed.get(case)
    with bench.may_fail(case):
        its.__exit__(type(error) if error else None, error, None)


@contextmanager
def peer_engine(name: str, setting: Setting) -> Iterator[Engine]:
    """One with a peer of ours, which has as much memory; it ends by SIGKILL, too. Raises
    EngineDied, RuntimeError."""
    if name == "native":
        native = native_config(setting.store_bytes)
        with Engine(setting.model, kv_transfer_config=native, **setting.arguments) as engine:
            yield engine
            engine.kill()
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
    parser.add_argument("--apart", action="store_true", help="not beside ours, but afterwards")
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
        measure(bench, replace(setting, codec=args.codec), peers=args.peer, apart=args.apart)
    bars = [] if args.quick else bench.bars(args.peer, exact=args.codec == NONE)
    title = ", ".join(filter(None, [title, bench.cores()]))
    report(title, bench.rows(), bars, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
