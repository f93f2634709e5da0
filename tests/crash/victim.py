"""A process that works on a store until it is killed, saying on stdout what was acknowledged.

Roles: ``writer`` puts and flushes, ``reader`` matches, leases and reads, ``evictor`` empties,
deletes and presses, ``put`` puts one prompt when told to, ``idle`` only holds the store open.
A wrong byte ends it with status 3: that is the one thing that must never happen.
"""

from __future__ import annotations

import random
import sys
import time
from itertools import count

from prefixstore import PutState, Store, admin
from prefixstore.layout import Roi
from prefixstore.namespace import Namespace
from prefixstore.testing_data import content_of, region_of
from tests.store_helpers import namespace_in, put_content, read_content, refs_of

PROMPTS, DEPTH = 200, 6  # of those that may be evicted and deleted; writers' own go beyond
KEPT = 1_000_000


def say(text: str) -> None:
    print(text, flush=True)


def pause() -> None:
    """Leave the others some of two cores, and the checks less to read."""
    time.sleep(0.02)


def write(ns: Namespace, rng: random.Random, number: int) -> None:
    for step in count():
        prompt = KEPT * (number + 1) + step
        refs = refs_of(ns, prompt, rng.randint(1, DEPTH))
        if rng.random() < 0.5:
            states = put_content(ns, refs, group=number + 1)
        else:
            for heads in ((0, 1), (1, 4)):
                roi = Roi(0, 4, *heads)
                data = [content_of(ref.key, ns.layout.payload_bytes) for ref in refs]
                states = ns.put(refs, [region_of(one, ns.layout, roi) for one in data], roi=roi)
        stored = all(state is PutState.STORED for state in states)
        if stored and rng.random() < 0.4 and ns.store.flush(30):
            say(f"flushed {prompt} {len(refs)}")
        pause()


def read(ns: Namespace, rng: random.Random) -> None:
    while True:
        refs = refs_of(ns, rng.randrange(PROMPTS), DEPTH)
        found = ns.match(refs)
        lease, held = ns.lease(refs[: found.num_chunks], found.tiers)
        read_content(ns, refs[:held])
        if rng.random() < 0.8:
            ns.release(lease)
        pause()


def evict(ns: Namespace, rng: random.Random, number: int) -> None:
    while True:
        put_content(ns, refs_of(ns, rng.randrange(PROMPTS), DEPTH), group=number + 1)
        if rng.random() < 0.1:
            admin.empty_memory(ns.store)
        if rng.random() < 0.2:
            for ref in refs_of(ns, rng.randrange(PROMPTS), DEPTH):
                admin.remove(ns.store, admin.Selection(key=ref.key))
        pause()


def main() -> None:
    role, folder, number, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5])
    rng = random.Random(seed)
    store = Store.open(folder)
    ns = namespace_in(store)
    say("ready")
    try:
        if role == "writer":
            write(ns, rng, number)
        elif role == "reader":
            read(ns, rng)
        elif role == "evictor":
            evict(ns, rng, number)
        elif role == "put":
            sys.stdin.readline()
            put_content(ns, refs_of(ns, number, 16))
            say("put")
    except AssertionError as error:
        say(f"wrong {error}")
        sys.exit(3)
    sys.stdin.readline()
    store.close()


if __name__ == "__main__":
    main()
