"""One process of the model-based test: random operations, each checked against what must hold.

What a chunk holds follows from its key, so any process knows any chunk's right bytes. Prompts are
of two kinds. Those of all workers are put and read by everybody and never deleted. A worker's own
prompts are put, pinned, given a time to live and deleted by that worker alone (others read them),
so it knows what must and what must not be there:

  deleted or expired, and not stored again    must be a miss, everywhere and for good
  pinned, or leased                           must be a hit
  anything else                               may have been evicted; if it hits, it is right
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from prefixstore import PutState, Store, StoreError, admin
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.namespace import MISS, Namespace
from prefixstore.testing_data import content_of, outputs, region_of, regions
from tests.store_helpers import namespace_in, put_content, read_content, refs_of

SHARED_PROMPTS, SHARED_DEPTH = 40, 10
OWN_PROMPTS, OWN_DEPTH = 10, 3
REGIONS = 12


@dataclass
class Known:
    """The model: what this worker knows of its own chunks."""

    gone: set[bytes] = field(default_factory=set)
    pinned: set[bytes] = field(default_factory=set)
    expires: dict[bytes, float] = field(default_factory=dict)


class Worker:
    """Runs operations chosen by a seed."""

    def __init__(self, folder: str, number: int, seed: int) -> None:
        self.folder, self.number = folder, number
        self.rng = random.Random(seed)
        self.known = Known()
        self.done: Counter[str] = Counter()
        self.store = Store.open(folder)
        self.ns = namespace_in(self.store)
        all_regions = regions(self.ns.layout)
        self.regions = random.Random(0).sample(all_regions, REGIONS)
        for prompt in range(OWN_PROMPTS):
            self.known.gone.update(ref.key for ref in self.own(prompt))

    def shared(self) -> list[ChunkRef]:
        """A prompt of everybody's; low numbers are asked for more often."""
        prompt = int(SHARED_PROMPTS * self.rng.random() ** 2)
        return refs_of(self.ns, 1000 + prompt, self.rng.randint(1, SHARED_DEPTH))

    def own(self, prompt: int) -> list[ChunkRef]:
        return refs_of(self.ns, 10_000 * (self.number + 1) + prompt, OWN_DEPTH)

    # ------------------------------------------------------------------ operations
    def put_shared(self) -> None:
        refs = self.shared()
        if self.rng.random() < 0.2:  # as from two requests of one step of an engine
            refs += refs[: self.rng.randint(1, len(refs))]
        for state in put_content(self.ns, refs, group=self.number + 1):
            self.done[f"put {state.value}"] += 1
            assert state in (PutState.STORED, PutState.EXISTS, PutState.BUSY, PutState.FULL), state

    def get_shared(self) -> None:
        self.done.update(f"tier {tier}" for tier in read_content(self.ns, self.shared()))

    def get_region(self) -> None:
        refs, roi = self.shared(), self.rng.choice(self.regions)
        self._check_region(self.ns, refs, roi)

    def _check_region(self, ns: Namespace, refs: list[ChunkRef], roi: Roi) -> None:
        outs = outputs(ns.layout, len(refs), roi)
        for ref, tier, out in zip(refs, ns.get(refs, outs, roi=roi), outs, strict=True):
            payload = content_of(ref.key, ns.layout.payload_bytes)
            assert tier == MISS or out == region_of(payload, ns.layout, roi), (ref.key.hex(), roi)

    def get_leased(self) -> None:
        refs = self.shared()
        found = self.ns.match(refs)
        lease, held = self.ns.lease(refs[: found.num_chunks], found.tiers)
        time.sleep(self.rng.choice([0, 0, 0.01, 0.05]))
        assert self.ns.match(refs).num_chunks >= held, "a leased chunk is not found"
        tiers = read_content(self.ns, refs[:held])
        assert MISS not in tiers, f"a leased chunk is a miss: {tiers} of {found.tiers}"
        self.ns.release(lease)
        self.done["leased"] += held

    def put_own(self) -> None:
        known = self.known
        refs = self.own(self.rng.randrange(OWN_PROMPTS))
        if any(ref.key in known.expires or ref.key in known.pinned for ref in refs):
            return
        kind = self.rng.choice(["plain", "plain", "ttl", "pin"])
        if len(known.pinned) >= 6:
            kind = "plain"
        ttl_s = 1.0 if kind == "ttl" else None
        states = put_content(self.ns, refs, ttl_s=ttl_s, pin=kind == "pin", group=self.number + 1)
        for ref, state in zip(refs, states, strict=True):
            self.done[f"own {kind} {state.value}"] += 1
            known.gone.discard(ref.key)
            if state is not PutState.STORED:
                continue  # there from before, with the labels of before, or no room
            if kind == "ttl":
                known.expires[ref.key] = time.time() + 2.01
            elif kind == "pin" and self._pinned(ref):
                known.pinned.add(ref.key)

    def _pinned(self, ref: ChunkRef) -> bool:
        """Whether the pin was granted: a tier has only so much room for pins."""
        listed = admin.list_chunks(self.store, admin.Selection(key=ref.key))
        return any(chunk.row.pinned for chunk in listed)

    def delete_own(self) -> None:
        refs = self.own(self.rng.randrange(OWN_PROMPTS))
        for ref in refs:
            admin.remove(self.store, admin.Selection(key=ref.key))
            self.known.gone.add(ref.key)
            self.known.pinned.discard(ref.key)
            self.known.expires.pop(ref.key, None)
        self.done["deleted"] += len(refs)

    def check_own(self) -> None:
        known, now = self.known, time.time()
        for key in [key for key, end in known.expires.items() if end < now]:
            del known.expires[key]
            known.gone.add(key)
        for prompt in range(OWN_PROMPTS):
            refs = self.own(prompt)
            for ref, tier in zip(refs, read_content(self.ns, refs), strict=True):
                if ref.key in known.gone:
                    assert tier == MISS, f"{ref.key.hex()} was deleted; hit in tier {tier}"
                if ref.key in known.pinned:
                    assert tier != MISS, f"{ref.key.hex()} is pinned, but a miss"
        self.done["own checked"] += 1

    def get_others(self) -> None:
        refs = refs_of(self.ns, 10_000 * self.rng.randint(1, 4) + self.rng.randrange(10), OWN_DEPTH)
        read_content(self.ns, refs)

    def empty_memory(self) -> None:
        admin.empty_memory(self.store)
        self.done["emptied"] += 1

    def flush(self) -> None:
        assert self.store.flush(30)
        self.done["flushed"] += 1

    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.folder)
        self.ns = namespace_in(self.store)
        self.done["reopened"] += 1

    def run(self, count: int) -> None:
        """The operations with their weights."""
        weights: dict[Callable[[], None], float] = {
            self.put_shared: 30,
            self.get_shared: 20,
            self.get_region: 12,
            self.get_leased: 10,
            self.put_own: 8,
            self.delete_own: 4,
            self.check_own: 3,
            self.get_others: 8,
            self.empty_memory: 0.7,
            self.flush: 2,
            self.reopen: 0.7,
        }
        for step in range(count):
            [operation] = self.rng.choices(list(weights), list(weights.values()))
            try:
                operation()
            except (AssertionError, StoreError, OSError):
                print(f"worker {self.number}, step {step}: {operation.__name__}", file=sys.stderr)
                raise
        self.check_own()
        self.store.close()


def main() -> None:
    folder, number, seed, count = sys.argv[1], *map(int, sys.argv[2:5])
    worker = Worker(folder, number, seed)
    try:
        worker.run(count)
    except AssertionError:
        traceback.print_exc()
        sys.exit(1)
    print(json.dumps(worker.done))


if __name__ == "__main__":
    main()
