"""What ``prefixstore gc`` does: the keeper's housekeeping, at once and to the end.

A running engine does most of it by itself, a little each second. ``gc`` is for stores no engine has
open, and for what is never done unasked: giving the space of free slots back to the file system,
and dropping models that nobody stores for any more. Every step is one the keeper also does, so a
crash in between leaves what a crash of the keeper leaves: claims that the next ``reap`` resolves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from prefixstore import admin
from prefixstore.admin import Listed
from prefixstore.ledger import DISK, MEMORY, TIER_NAMES
from prefixstore.room import make_room
from prefixstore.store import Store

_BATCH = 1024  # chunks dropped in one transaction
_DEADLINE_S = 600.0


def collect(
    store: Store, *, older_than_s: float | None = None, empty_memory: bool = False
) -> dict[str, Any]:
    """Clean up; returns what was done, by stable names. None stands for a step not asked for."""
    now, before = time.time(), _allocated(store)
    done: dict[str, Any] = {"reaped": store.on_keeper(store.reap)}
    done["expired_chunks"] = _drop(store, lambda item: 0 < item.row.expires_s <= now)
    done["dropped_namespaces"], done["dropped_chunks"] = None, 0
    if older_than_s is not None:
        unused = _unused(store, now - older_than_s)
        done["dropped_namespaces"] = sorted(name.hex() for name in unused)
        done["dropped_chunks"] = _drop(store, lambda item: item.row.namespace in unused)
    done["memory_emptied_chunks"] = admin.empty_memory(store) if empty_memory else None
    done["evicted_chunks"] = store.on_keeper(partial(_to_caps, store), _DEADLINE_S)
    after = _allocated(store)
    done["freed_bytes"] = {TIER_NAMES[t]: max(0, before[t] - after[t]) for t in before}
    return done


def _drop(store: Store, chosen: Callable[[Listed], bool]) -> int:
    keys = [item.key for item in admin.list_chunks(store) if chosen(item)]
    for at in range(0, len(keys), _BATCH):
        store.on_keeper(partial(store.remove_now, keys[at : at + _BATCH]), _DEADLINE_S)
    return len(keys)


def _unused(store: Store, since_s: float) -> set[bytes]:
    """Namespaces whose newest chunk is older than that.

    A model in use stores new chunks all the time; when a chunk was last read is not kept as a time.
    """
    newest: dict[bytes, int] = {}
    for item in admin.list_chunks(store):
        row = item.row
        newest[row.namespace] = max(newest.get(row.namespace, 0), row.created_s)
    return {namespace for namespace, created_s in newest.items() if created_s < since_s}


def _allocated(store: Store) -> dict[int, int]:
    with store.live.read() as txn:
        return {tier: store.ledger.allocated(txn, tier) for tier in (MEMORY, DISK)}


def _to_caps(store: Store) -> int:
    """Keeper job: free slots first, then as many chunks as a tier is over its cap."""
    before, end = _chunks(store), time.monotonic() + _DEADLINE_S
    last = -1
    while True:
        for tier in (MEMORY, DISK):
            admin.give_back_free(store, tier, end)
        now, over = _chunks(store), any(_over(store, tier) > 0 for tier in (MEMORY, DISK))
        if not over or now == last or time.monotonic() > end:
            return max(0, before - now)  # the rest is leased, or not yet on disk
        last = now
        make_room(store)


def _over(store: Store, tier: int) -> int:
    with store.live.read() as txn:
        return store.ledger.allocated(txn, tier) - store.ledger.cap(txn, tier)


def _chunks(store: Store) -> int:
    with store.live.read() as txn:
        return txn.count("heat")
