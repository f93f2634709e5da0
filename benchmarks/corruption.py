"""Damage of every kind at every kind of place of a store: nothing wrong may be served.

``python -m benchmarks.corruption [--cases N] [--seed S] [--places NAME ...] [--json] [--check]``

A small store with chunks in both tiers is made once. For each case its files are put back, one is
damaged (`corruption_kinds`), and a child process opens the store, looks every chunk up, stores what
it did not find (each must be found then), reads every chunk whole and in parts, compares each byte
with what was put (a hash of the key, so nothing has to be remembered),
stores again what was missing, and verifies. A case ends well in one of two ways:

- healed: everything that was read was right or missing, what was missing could be stored again,
  and the store is sound afterwards (`verify --fix`);
- refused: opening or using the store raises a StoreError that says what to do.

Both a second time as well: what was only put off would show then.

A wrong byte, a crash or a hang of the process, any other exception, or a store that stays unsound
is a failure; each is printed with the seed that repeats it (``--seed S --cases 1``).
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.corruption_kinds import KINDS, Kind, Pristine
from benchmarks.table import Bar, add_arguments, report
from prefixstore import Layout, Store, admin
from prefixstore.errors import StoreError
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.namespace import MISS, Namespace
from prefixstore.testing_data import content_of, identity_for, outputs, region_of, tokens_of

LAYOUT = Layout(num_layers=4, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=128)
PROMPTS, CHUNKS = 6, 8  # of which the first half is in memory, too
DEADLINE_S = 60.0  # of a case, in which everything else has a shorter one
PARTS = (Roi(1, 3, 0, 2), Roi(0, 4, 1, 2))
SHOWN = 20


@dataclass
class Outcome:
    """What became of one case: ``ended`` is healed, refused, or what went wrong."""

    ended: str = ""
    detail: str = ""
    right: int = 0
    missing: int = 0


@dataclass
class Tally:
    """Cases of one kind at one place."""

    cases: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    missing: int = 0


@functools.cache  # of the parent's: children begin with it
def content(key: bytes) -> bytes:
    """What was put under a key."""
    return content_of(key, LAYOUT.payload_bytes)


def refs_in(namespace: Namespace) -> list[ChunkRef]:
    """All chunks of the store."""
    return [
        ref
        for seed in range(PROMPTS)
        for ref in namespace.chain(tokens_of(seed, CHUNKS, LAYOUT)).refs()
    ]


def make_store(folder: Path, memory_dir: Path) -> None:
    """The store that is damaged: half of its chunks in both tiers, half on disk only."""
    sizes: dict[str, Any] = {
        "memory_bytes": "4MiB",
        "disk_bytes": "8MiB",
        "memory_dir": str(memory_dir),
    }
    with Store.open(folder, **sizes) as store:
        namespace = store.namespace(identity_for("a", LAYOUT), LAYOUT)
        refs = refs_in(namespace)
        half = len(refs) // 2
        for part in (refs[half:], refs[:half]):
            namespace.put(part, [content(ref.key) for ref in part])
            store.flush()
            if part[0] is refs[half]:
                admin.empty_memory(store)


# ---------------------------------------------------------------------- in the child
def read_all(namespace: Namespace, refs: list[ChunkRef], outcome: Outcome) -> list[ChunkRef]:
    """Read every chunk whole and in parts; those that are missing. Notes what is wrong."""
    missing = []
    for roi in (LAYOUT.whole, *PARTS):
        outs = outputs(LAYOUT, len(refs), roi)
        for ref, tier, out in zip(refs, namespace.get(refs, outs, roi), outs, strict=True):
            if tier == MISS:
                if roi == LAYOUT.whole:
                    missing.append(ref)
            elif out != region_of(content(ref.key), LAYOUT, roi):
                outcome.ended, outcome.detail = "wrong bytes", f"{ref.key.hex()} from tier {tier}"
    return missing


def match_heals(namespace: Namespace, refs: list[ChunkRef], payloads: list[bytes]) -> int:
    """As an engine, twice: look up, store what is not there. How many are not there then."""
    for _ in range(2):
        namespace.match_each(refs)
        namespace.store.on_keeper(lambda: None)  # what could not be used has been looked into
        namespace.put(refs, payloads)
        namespace.store.on_keeper(lambda: None)
    namespace.store.flush()
    return namespace.match_each(refs).count(MISS)


def use(folder: Path, outcome: Outcome) -> None:
    """What a user of the damaged store does."""
    with Store.open(folder, create=False) as store:
        namespace = store.namespace(identity_for("a", LAYOUT), LAYOUT)
        refs = refs_in(namespace)
        for prompt in range(PROMPTS):
            namespace.match(refs[prompt * CHUNKS : (prompt + 1) * CHUNKS])
        again = [content(ref.key) for ref in refs]
        not_found = match_heals(namespace, refs, again)
        missing = read_all(namespace, refs, outcome)
        outcome.right, outcome.missing = len(refs) - len(missing), len(missing)
        store.on_keeper(lambda: None)  # what was found damaged has been looked at
        namespace.put(refs, again)
        store.flush()
        admin.verify(store, fix=True)
        namespace.put(refs, again)  # what only verify found
        still = read_all(namespace, refs, outcome)
        if outcome.ended:
            return
        found = admin.verify(store)
        if not_found:
            outcome.ended, outcome.detail = "not found again", f"{not_found} chunks"
        elif still:
            outcome.ended, outcome.detail = "not stored again", f"{len(still)} chunks"
        elif not found.sound:
            outcome.ended, outcome.detail = "unsound", str(asdict(found))[:400]
        else:
            outcome.ended = "healed"


def child(folder: Path, answers: Connection) -> None:
    """One case, in a process of its own."""
    outcome = Outcome()
    try:
        use(folder, outcome)
    except StoreError as error:
        if outcome.ended != "wrong bytes":
            outcome.ended, outcome.detail = "refused", str(error)
            if not error.hint:
                outcome.ended = "refused without a remedy"
    except Exception as error:  # request loop: the parent counts it as a failure
        if outcome.ended != "wrong bytes":
            outcome.ended, outcome.detail = "exception", f"{type(error).__name__}: {error}"
    answers.send_bytes(json.dumps(asdict(outcome)).encode())
    answers.close()


# ---------------------------------------------------------------------- cases
def run_case(folder: Path) -> Outcome:
    """Let a child use the store, and see how it fares."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(folder, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(DEADLINE_S):
            return Outcome("hang", f"nothing after {DEADLINE_S:.0f} s")
        return Outcome(**json.loads(ours.recv_bytes()))
    except EOFError:
        process.join(DEADLINE_S)
        return Outcome("crash", f"exit status {process.exitcode}")
    finally:
        ours.close()
        process.kill()
        process.join()


def run(args: argparse.Namespace) -> tuple[dict[str, Tally], list[str]]:
    """All cases; what became of them by place and kind, and the failures."""
    chosen = [kind for kind in KINDS if not args.places or kind.place in args.places]
    tallies: dict[str, Tally] = {}
    failures = []
    with tempfile.TemporaryDirectory(prefix="prefixstore-corruption-") as name:
        folder, memory_dir = Path(name, "store"), Path(name, "memory")
        memory_dir.mkdir()
        make_store(folder, memory_dir)
        pristine = Pristine(folder, memory_dir, identity_for("a", LAYOUT).namespace)
        for seed in range(args.seed, args.seed + args.cases):
            rng = random.Random(seed)
            kind: Kind = rng.choice(chosen)
            pristine.restore()
            what = kind.damage(pristine, rng)
            outcome = run_case(folder)
            if outcome.ended in ("healed", "refused"):  # what was only put off shows now
                again = run_case(folder)
                if again.ended != outcome.ended and again.ended != "healed":
                    outcome = Outcome(f"the second time {again.ended}", again.detail)
            tally = tallies.setdefault(f"{kind.place}: {kind.name}", Tally())
            tally.cases += 1
            tally.ended[outcome.ended] += 1
            tally.missing += outcome.missing
            if outcome.ended not in ("healed", "refused"):
                ended = f"{outcome.ended}: {outcome.detail}"
                failures.append(f"seed {seed}: {kind.place}: {what}: {ended}")
    return tallies, failures


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corruption")
    add_arguments(parser)
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    places = sorted({kind.place for kind in KINDS})
    parser.add_argument("--places", nargs="+", choices=places, help="only these")
    args = parser.parse_args()
    tallies, failures = run(args)
    rows = [
        {
            "damage": name,
            "cases": tally.cases,
            "healed": tally.ended["healed"],
            "refused": tally.ended["refused"],
            "failed": tally.cases - tally.ended["healed"] - tally.ended["refused"],
            "chunks_missing": tally.missing,
        }
        for name, tally in sorted(tallies.items())
    ]
    for line in failures[:SHOWN]:
        print(line, file=sys.stderr)
    bars = [Bar("cases that ended badly", float(len(failures)), 0.0, "<=")]
    report("Corruption", rows, bars, args)


if __name__ == "__main__":
    main()
