"""One host of `test_two_hosts`, as a process in a network of its own: a folder before a pool.

``python -m tests.pool.host_child URL FOLDER MEMORY_DIR``; then a line of JSON in, a line out.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from prefixstore.fronted import FrontedStore
from prefixstore.interface import open_store
from prefixstore.layout import Layout
from prefixstore.namespace import MISS
from prefixstore.testing_data import content_of, identity_for, outputs, tokens_of

LAYOUT = Layout(num_layers=4, num_planes=2, num_heads=2, chunk_tokens=8, head_bytes=512)
SIZE = LAYOUT.payload_bytes  # 64 KiB
DEADLINE_S = 1.0


class Host:
    """See the module docstring."""

    def __init__(self, url: str, folder: str, memory_dir: str) -> None:
        store = open_store(
            url, front=folder, memory_bytes="64MiB", disk_bytes="64MiB", memory_dir=memory_dir,
            deadline_s=DEADLINE_S,
        )  # fmt: skip
        assert isinstance(store, FrontedStore)
        self.store = store
        self.ns = store.namespace(identity_for("a", LAYOUT), LAYOUT)

    def put(self, seed: int, count: int, flush_s: float = 30.0) -> dict[str, Any]:
        """Store a text."""
        refs = self.ns.chain(tokens_of(seed, count, LAYOUT)).refs()
        states = self.ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
        return {"states": [state.value for state in states], "flushed": self.store.flush(flush_s)}

    def read(self, seed: int, count: int, far: bool = False) -> dict[str, Any]:
        """Match and read a text, or read it from the pool; how many chunks are wrong."""
        refs = self.ns.chain(tokens_of(seed, count, LAYOUT)).refs()
        found = self.ns.match(refs).tiers
        outs = outputs(LAYOUT, count)
        tiers = self.ns.remote.get(refs, outs) if far else self.ns.get(refs, outs)
        wrong = sum(
            tier != MISS and out != content_of(ref.key, SIZE)
            for ref, tier, out in zip(refs, tiers, outs, strict=True)
        )
        return {"match": list(found), "tiers": tiers, "wrong": wrong}

    def segments(self, seed: int, count: int) -> dict[str, Any]:
        """Find a text without its first token."""
        found = self.ns.find_segments(tokens_of(seed, count, LAYOUT)[1:])
        return {"found": [(one.start, one.num_tokens, one.source_start) for one in found]}

    def load(self, seconds: float, seed: int, texts: int) -> dict[str, Any]:
        """Match texts and read them from the pool, again and again: how many turns waited for a
        deadline, and how long the slowest took."""
        took: list[float] = []
        hits = misses = wrong = 0
        end = time.monotonic() + seconds
        print(json.dumps({"began": True}), flush=True)
        while time.monotonic() < end:
            began = time.monotonic()
            told = self.read(seed + len(took) % texts, 4, far=True)
            took.append(time.monotonic() - began)
            hits += sum(tier != MISS for tier in told["tiers"])
            misses += told["tiers"].count(MISS)
            wrong += told["wrong"]
        took.sort()
        return {
            "turns": len(took), "hits": hits, "misses": misses, "wrong": wrong,
            "slow": sum(one >= DEADLINE_S for one in took), "slowest_s": took[-1],
        }  # fmt: skip

    def bye(self) -> dict[str, Any]:
        """Close."""
        self.store.close()
        return {}


def main() -> None:
    """See the module docstring."""
    host = Host(*sys.argv[1:])
    print(json.dumps({"open": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(host, asked.pop("do"))(**asked)), flush=True)


if __name__ == "__main__":
    main()
