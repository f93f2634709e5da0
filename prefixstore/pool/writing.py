"""Writing whole chunks to a pool: first the parts before the last, then what says that they are
there. A writer that dies in between leaves parts that the next one writes again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from prefixstore.errors import LayoutError
from prefixstore.keys import KEY_BYTES, ChunkRef, is_honest
from prefixstore.pool.backend import Put, Written
from prefixstore.pool.objects import make_trailer, trailer_size
from prefixstore.putting import Labels, PutState
from prefixstore.serve.limits import ITEMS_BYTES_MAX

if TYPE_CHECKING:
    from prefixstore.pool.namespace import PooledNamespace

_STATES = {
    Written.YES: PutState.STORED,
    Written.THERE: PutState.EXISTS,
    Written.FULL: PutState.FULL,
    Written.NO: PutState.LOST,
}


def write(
    ns: PooledNamespace,
    refs: Sequence[ChunkRef],
    payloads: Sequence[memoryview],
    labels: Labels,
    deadline_s: float,
) -> list[PutState]:
    """Write chunks that are not there, in one go. Raises LayoutError, RemoteError."""
    end = time.monotonic() + deadline_s
    check(ns, refs)
    states = [PutState.EXISTS] * len(refs)
    # A chunk in several objects is asked about in any case: its parts are written over.
    asks = ns.backend.ask_first or ns.shape.num_parts > 0
    there = ns.exist([ref.key for ref in refs]) if asks else [False] * len(refs)
    first = {ref.key: i for i, ref in reversed(list(enumerate(refs)))}  # one may be twice in it
    new = [i for i, ref in enumerate(refs) if not there[i] and first[ref.key] == i]
    ttl_s = max(0.001, labels.expires_s - time.time()) if labels.expires_s else None
    failed = _write_parts(ns, refs, payloads, new, ttl_s, end)
    heads = []
    for i in (new := [i for i in new if i not in failed]):
        trailer = partial(make_trailer, ns.shape, refs[i], ns.name, payloads[i], labels)
        size = trailer_size(ns.shape, refs[i], labels)
        last = payloads[i][ns.shape.last_start :]
        heads.append(Put(ns.shape.object_of(refs[i].key), [last], trailer, size))
    done = ns.backend.put(heads, ttl_s=ttl_s, deadline_s=end - time.monotonic())
    for i, written in [*zip(new, done, strict=True), *failed.items()]:
        states[i] = _STATES[written]
    stored = [refs[i].key for i in new if states[i] is PutState.STORED]
    if stored:
        ns.store.noted(ns.name, stored)
    return states


def check(ns: PooledNamespace, refs: Sequence[ChunkRef]) -> None:
    """Who forges a key, or keeps a book in a preimage, stores nothing. Raises LayoutError."""
    least = KEY_BYTES + 4 * ns.layout.chunk_tokens
    for ref in refs:
        if not is_honest(ref):
            raise LayoutError("a key that is not the hash of its preimage", "see docs/format.md")
        if not least <= len(ref.preimage) <= least + ITEMS_BYTES_MAX:
            raise LayoutError(
                f"a preimage of {len(ref.preimage)} bytes",
                f"{least} needed, and at most {ITEMS_BYTES_MAX} more for multimodal items",
            )


def _write_parts(
    ns: PooledNamespace,
    refs: Sequence[ChunkRef],
    payloads: Sequence[memoryview],
    which: Sequence[int],
    ttl_s: float | None,
    end: float,
) -> dict[int, Written]:
    """Write what goes before the last part; the chunks of which that failed."""
    shape, puts, owners = ns.shape, [], []
    for i in which:
        for number in range(shape.num_parts):
            start = number * shape.part_bytes
            cut = payloads[i][start : start + shape.part_bytes]
            puts.append(Put(shape.part_of(refs[i].key, number), [cut]))
            owners.append(i)
    done = ns.backend.put(puts, ttl_s=ttl_s, replace=True, deadline_s=end - time.monotonic())
    return {i: one for i, one in zip(owners, done, strict=True) if one is not Written.YES}
