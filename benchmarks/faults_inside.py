"""Faults that a process meets itself, for `benchmarks.faults`: one process and store each.

``python -m benchmarks.faults_inside NAME FOLDER SECONDS SEED`` does random operations on threads
(`soak_client`), a third of the time before the fault, a third in it, a third behind; then looks
whether the store is whole, and answers with one JSON line. What is wrong: what `soak_client` calls
so, any exception that is no StoreError, and whatever else the fault must not do (see each).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.fault_shim import Shim
from benchmarks.faults_kinds import FAULTS
from benchmarks.soak_client import LAYOUT, SIZE, Client
from prefixstore import Store, admin
from prefixstore.errors import StoreClosedError, StoreError
from prefixstore.interface import StoreLike
from prefixstore.ledger import DISK
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.testing_data import content_of, identity_for, outputs, tokens_of

THREADS = 3
STUCK_S = 60.0  # behind the end: more than any deadline of the store
RECOVER_S = 60.0


@dataclass
class Outcome:
    """A row of the table, but for its name."""

    operations: int = 0
    errors: int = 0
    wrong: int = 0
    stuck: int = 0
    recovered: bool = False
    longest_s: float = 0.0
    detail: str = ""
    of_before: float | None = None  # goodput in the fault, of that before it
    bars: list[tuple[str, float, float, str]] = field(default_factory=list)


class Load:
    """Clients at work."""

    def __init__(self, store: StoreLike, seed: int) -> None:
        self.counts: list[Counter[str]] = [Counter() for _ in range(THREADS)]
        self.longest_s = 0.0
        self._stop = threading.Event()
        clients = [Client(store, 100 * seed + i, counts) for i, counts in enumerate(self.counts)]
        self._threads = [
            threading.Thread(target=self._work, args=(one,), daemon=True) for one in clients
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, client: Client) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                client.step()
            except Exception as error:  # thread loop: no caller should ever see one of these
                client.counts[f"wrong: {type(error).__name__}: {error}"] += 1
                time.sleep(0.05)
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    def end(self) -> tuple[Counter[str], int]:
        """What was done, and how many threads do not end."""
        self._stop.set()
        end = time.monotonic() + STUCK_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return sum(self.counts, Counter()), sum(one.is_alive() for one in self._threads)


def is_whole(store: Store, seed: int) -> str:
    """What does not work as in a store to which nothing happened; "" if everything does."""
    ns = store.namespace(identity_for(f"after-{seed}", LAYOUT), LAYOUT)
    refs = ns.chain(tokens_of(seed, 4, LAYOUT)).refs()
    states = ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
    if set(states) - {PutState.STORED, PutState.EXISTS}:
        return f"put: {states}"
    if not store.flush():
        return "no flush"
    admin.empty_memory(store)
    outs = outputs(LAYOUT, len(refs))
    tiers = ns.get(refs, outs)
    expected = DISK if store.has_disk else MISS
    if tiers != [expected] * len(refs):
        return f"read from {tiers}"
    if expected != MISS and any(
        bytes(out) != content_of(ref.key, SIZE) for out, ref in zip(outs, refs, strict=True)
    ):
        return "other bytes"
    store.on_keeper(store.reap)
    found = admin.verify(store)
    return "" if found.sound else f"unsound: {found}"


def recovered(store: Store, seed: int) -> tuple[Store, str]:
    """Wait until the store is whole, and open it again if it asks for that; "" when it is."""
    end, told = time.monotonic() + RECOVER_S, "?"
    while told and time.monotonic() < end:
        try:
            told = is_whole(store, seed)
        except StoreClosedError as error:
            told = str(error)
            store.close()
            store = Store.open(store.folder)
        except StoreError as error:
            told = str(error)
        seed += 1
        if told:
            time.sleep(0.2)
    return store, told


def run(name: str, folder: Path, seconds: float, seed: int, shim: Shim | None) -> Outcome:
    """One fault."""
    kind = FAULTS[name]
    (folder / "memory").mkdir()
    store = Store.open(
        folder / "disk" / "store", memory_bytes=kind.memory, disk_bytes=kind.disk,
        memory_dir=str(folder / "memory"),
    )  # fmt: skip
    fault, outcome = kind(store, store.folder, shim), Outcome()
    load = Load(store, seed)
    time.sleep(seconds / 3)
    fault.happen(seconds / 3)
    time.sleep(seconds / 3)
    counts, outcome.stuck = load.end()
    counts += fault.wrong
    told = "stuck"
    if not outcome.stuck:
        fault.store, told = recovered(store, seed)
    if not told:
        before = Counter(fault.wrong)
        fault.after()
        counts += fault.wrong - before
        fault.store.close()
    wrong = {n: c for n, c in counts.items() if n.startswith("wrong") or n in fault.wrong}
    outcome.operations, outcome.wrong = counts["operations"], sum(wrong.values())
    outcome.errors = sum(c for n, c in counts.items() if n.startswith(("error", "refused")))
    outcome.recovered, outcome.longest_s = not told, load.longest_s
    outcome.detail = "; ".join(
        filter(None, [told, *sorted(f"{n} ({c})" for n, c in wrong.items())])
    )
    return outcome


def main() -> None:
    """See the module docstring."""
    name, folder, seconds, seed = sys.argv[1:]
    control = os.environ.get("FAULT_CONTROL")
    shim = Shim(Path(control), Path(folder)) if control else None
    outcome = run(name, Path(folder), float(seconds), int(seed), shim)
    print(json.dumps(asdict(outcome)), flush=True)
    os._exit(0)  # a thread that is stuck must not keep the process


if __name__ == "__main__":
    main()
