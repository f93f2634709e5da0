"""Clients of one tenant for `benchmarks.soak`: random operations against a model, on threads.

``python -m benchmarks.soak_client ADDRESS TOKEN TENANT SEED THREADS`` reads a number of seconds a
line from standard input, works for so long, and answers with one JSON line of counts. Threads share
connections. Each has prompts of its own, of which its model knows what may be there, and prompts
that all threads of the tenant share, of which any hit must be right. What a chunk must hold follows
from its key alone. Errors of the store are expected while the server dies; what is counted as
wrong: a byte that differs, a chunk that is there after its delete was answered or that nobody ever
put, and an answer of 500.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from prefixstore.client.caller import RefusedError
from prefixstore.client.remote import RemoteStore
from prefixstore.errors import StoreError
from prefixstore.interface import StoreLike
from prefixstore.keys import ChunkRef, KeyChain
from prefixstore.layout import Layout, Roi
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.testing_data import content_of, identity_for, outputs, region_of, tokens_of

LAYOUT = Layout(num_layers=4, num_planes=2, num_heads=2, chunk_tokens=8, head_bytes=128)  # 16 KiB
PROMPT_CHUNKS = 6
OWN_PROMPTS, SHARED_PROMPTS = 24, 12
SIZE = LAYOUT.payload_bytes
Refs = list[ChunkRef]


@lru_cache(maxsize=1024)
def prompt_of(namespace: bytes, number: int) -> Refs:
    """The chunks of a prompt."""
    tokens = tokens_of(number, PROMPT_CHUNKS, LAYOUT)
    return KeyChain(namespace, LAYOUT.chunk_tokens, tokens).refs()


@lru_cache(maxsize=2048)
def payload_of(key: bytes) -> bytes:
    """What a chunk must hold."""
    return content_of(key, SIZE)


class Client:
    """One thread's client and its model."""

    def __init__(self, store: StoreLike, seed: int, counts: Counter[str]) -> None:
        self.store, self.counts, self.rng = store, counts, random.Random(seed)
        self.label = f"own-{seed}"
        self.ns: dict[str, Any] = {}  # NamespaceLike; RemoteNamespace of a server
        self.seed = seed
        self.maybe: set[bytes] = set()  # own keys that may be there

    def namespace(self, label: str) -> Any:
        """The namespace of a label, entered when it is needed."""
        if label not in self.ns:
            self.ns[label] = self.store.namespace(identity_for(label, LAYOUT), LAYOUT)
        return self.ns[label]

    def prompt(self) -> tuple[Any, Refs, bool]:
        """A namespace, some leading chunks of a prompt, and whether the prompt is its own."""
        own = self.rng.random() < 0.7
        ns = self.namespace(self.label if own else "shared")
        most = OWN_PROMPTS if own else SHARED_PROMPTS
        number = self.rng.randrange(most) + (1000 * (1 + self.seed) if own else 0)
        return ns, prompt_of(ns.name, number)[: self.rng.randint(1, PROMPT_CHUNKS)], own

    def wrong(self, what: str) -> None:
        """Something that must never be."""
        self.counts[f"wrong: {what}"] += 1

    def check(self, refs: Refs, found: list[bool], own: bool) -> None:
        """Nothing may be there that was deleted, or never put."""
        for ref, there in zip(refs, found, strict=True):
            if own and there and ref.key not in self.maybe:
                self.wrong("a chunk that cannot be there")

    # ------------------------------------------------------------------ operations
    def put(self) -> None:
        """Store chunks, whole or as two ranks do, with labels of all kinds."""
        ns, refs, own = self.prompt()
        rng = self.rng
        if own:
            self.maybe |= {ref.key for ref in refs}
        wholes = [payload_of(ref.key) for ref in refs]
        options = {"ttl_s": rng.choice([None, None, 1.0, 600.0]), "tag": rng.choice(["", "soak"])}
        if rng.random() < 0.8:
            states = ns.put(refs, wholes, pin=rng.random() < 0.02, **options)
        else:
            group = rng.randrange(1, 2**63)
            self.counts["requests"] += 1
            for head in range(2):
                roi = Roi(0, LAYOUT.num_layers, head, head + 1)
                parts = [region_of(one, LAYOUT, roi) for one in wholes]
                states = ns.put(refs, parts, roi=roi, group=group, **options)
        for state in states:
            self.counts[f"put {state.value}"] += 1
        assert PutState.WRITING not in states

    def get(self) -> None:
        """Read some chunks, or a region of them, and compare every byte."""
        ns, refs, own = self.prompt()
        rng = self.rng
        some = rng.sample(refs, rng.randint(1, len(refs)))
        roi = None
        if rng.random() < 0.3:
            start = rng.randrange(LAYOUT.num_layers)
            heads = rng.choice([(0, 1), (1, 2), (0, 2)])
            roi = Roi(start, rng.randint(start + 1, LAYOUT.num_layers), *heads)
        outs = outputs(LAYOUT, len(some), roi)
        tiers = ns.get(some, outs, roi)
        for ref, tier, out in zip(some, tiers, outs, strict=True):
            if tier == MISS:
                continue
            expected = payload_of(ref.key)
            if bytes(out) != (expected if roi is None else region_of(expected, LAYOUT, roi)):
                self.wrong("bytes")
            self.counts["hits"] += 1
        self.counts["bytes read"] += sum(len(o) for o, t in zip(outs, tiers, strict=True) if t)
        self.check(some, [tier != MISS for tier in tiers], own)

    def match(self) -> None:
        """Look for a prompt; sometimes hold what is there while it is read."""
        ns, refs, own = self.prompt()
        found = ns.match(refs)
        self.check(refs, [i < found.num_chunks for i in range(len(refs))], own)
        if found.num_chunks and self.rng.random() < 0.3:
            there = refs[: found.num_chunks]
            self.counts["requests"] += 3
            lease, held = ns.lease(there, found.tiers, self.rng.choice([1.0, 60.0]))
            outs = outputs(LAYOUT, held)
            tiers = ns.get(there[:held], outs)
            for ref, tier, out in zip(there, tiers, outs, strict=False):
                if tier != MISS and bytes(out) != payload_of(ref.key):
                    self.wrong("bytes")
            if self.rng.random() < 0.9:  # else it ends by itself
                ns.release(lease)

    def delete(self) -> None:
        """Remove chunks; they must not be found again until they are stored again."""
        ns, refs, own = self.prompt()
        ns.delete(refs)
        if own:
            self.maybe -= {ref.key for ref in refs}

    def end_soon(self) -> None:
        """Change a time to live."""
        ns, refs, _ = self.prompt()
        ns.set_ttl(refs, self.rng.choice([None, 0.5, 3600.0]))

    def segments(self) -> None:
        """Look for a prompt's text in the middle of another."""
        ns, refs, _ = self.prompt()
        tokens = np.frombuffer(b"".join(ref.preimage[16:] for ref in refs), "<i4")
        for one in ns.find_segments([*range(900, 917), *tokens.tolist()]):
            self.counts["segment tokens"] += one.num_tokens

    def small(self) -> None:
        """Calls that carry no KV."""
        ns, refs, own = self.prompt()
        which = self.rng.randrange(5)
        if which == 0:
            ns.pin(refs, self.rng.random() < 0.1)
        elif which == 1:
            ns.prefetch(refs)
        elif which == 2:
            told = ns.explain(refs)["found_chunks"]
            self.check(refs, [i < told for i in range(len(refs))], own)
        elif which == 3:
            ns.note_staleness(refs, np.ones((len(refs), LAYOUT.chunk_tokens), np.float32))
        else:
            ns.staleness_of(refs)

    def bump(self) -> None:
        """New weights: nothing of before may be there."""
        old = self.namespace(self.label)
        del self.ns[self.label]  # whatever comes of it
        old.bump()
        self.maybe.clear()
        self.counts["bumps"] += 1

    def choices(self) -> list[tuple[float, Callable[[], None]]]:
        """Operations, and how often each is done."""
        here = [
            (0.30, self.get), (0.25, self.put), (0.22, self.match),
            (0.05, self.delete), (0.04, self.end_soon), (0.035, self.segments),
        ]  # fmt: skip
        only_remote = [(0.10, self.small), (0.005, self.bump)]
        return here + only_remote if isinstance(self.store, RemoteStore) else here

    def step(self) -> None:
        """One operation."""
        choices = self.choices()
        [work] = self.rng.choices([one[1] for one in choices], [one[0] for one in choices])
        try:
            work()
            self.counts["operations"] += 1
            self.counts["requests"] += 1
            self.counts[work.__name__] += 1
        except RefusedError as error:
            self.counts[f"refused: {error.code}"] += 1
            if error.code in ("internal", "http"):
                self.wrong(f"an answer of 500: {error}")
        except StoreError as error:
            self.counts[f"error: {type(error).__name__}"] += 1
            if "open it again" in str(error):
                self.ns.clear()
            time.sleep(0.05)  # as an engine does: it computes instead


def main() -> None:
    """See the module docstring."""
    address, token, tenant, seed, threads = sys.argv[1:]
    counts: list[Counter[str]] = [Counter() for _ in range(int(threads))]
    with RemoteStore(address, token=token, deadline_s=5.0) as store:
        clients = [Client(store, 100 * int(seed) + i, counts[i]) for i in range(int(threads))]
        for line in sys.stdin:
            end = time.monotonic() + float(line)

            def work(client: Client, end: float = end) -> None:
                while time.monotonic() < end:
                    client.step()

            running = [threading.Thread(target=work, args=(client,)) for client in clients]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            total = sum(counts, Counter())
            for one in counts:
                one.clear()
            print(json.dumps({"tenant": tenant, "counts": total}), flush=True)


if __name__ == "__main__":
    main()
