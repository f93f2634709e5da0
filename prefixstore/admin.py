"""What operators do with a store: list, count, pin, remove, verify. Used by the command line.

``verify`` is the independent check: it walks every row of both tiers, reads every byte, recomputes
every checksum, and compares the accounting of slots with the rows. ``fix`` drops what is damaged
and recounts; it never guesses bytes, and leaves alone what it may not read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prefixstore.accounting import check_accounting, drop_rows, mend, rows_without_slot
from prefixstore.config import PUNCH_AFTER_S
from prefixstore.errors import ConfigError
from prefixstore.healing import fault, heal
from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY, TIER_NAMES
from prefixstore.pinning import set_pins
from prefixstore.rows import Row, unpack_address
from prefixstore.segment_check import check_segments
from prefixstore.store import Store

Progress = Callable[[int, int], None]
_BATCH = 1024  # chunks changed in one transaction
_DROP_BYTES = 1 << 30  # freed in one transaction
_GIVE_BACK_SLOTS = 256  # in one transaction: each is a system call under the writer lock


@dataclass(frozen=True, slots=True)
class Listed:
    """One chunk as `ls` shows it."""

    key: bytes
    row: Row
    tiers: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Stable keys."""
        return {
            "key": self.key.hex(),
            "namespace": self.row.namespace.hex(),
            "salt": self.row.salt.hex() if any(self.row.salt) else None,
            "depth": self.row.depth,
            "tiers": [TIER_NAMES[tier] for tier in self.tiers],
            "bytes": self.row.slot_bytes,
            "pinned": self.row.pinned,
            "tag": self.row.tag.decode(errors="replace") or None,
            "created_s": self.row.created_s,
            "expires_s": self.row.expires_s or None,
        }


@dataclass(frozen=True, slots=True)
class Selection:
    """Which chunks: all conditions given must hold; at least one must be given."""

    key: bytes | None = None
    namespace: bytes | None = None
    tag: bytes | None = None
    everything: bool = False

    def __post_init__(self) -> None:
        if not self.everything and self.key is self.namespace is self.tag is None:
            raise ConfigError("nothing selected", "give a key, a namespace, a tag, or --all")

    def __call__(self, key: bytes, row: Row) -> bool:
        """Whether a chunk is selected. A key or namespace may be given by its first bytes."""
        return (
            (self.key is None or key.startswith(self.key))
            and (self.namespace is None or row.namespace.startswith(self.namespace))
            and (self.tag is None or row.tag == self.tag)
        )


def list_chunks(store: Store, chosen: Selection | None = None) -> Iterator[Listed]:
    """All chunks, or those selected, in key order; one entry for a chunk in both tiers."""
    with store.live.read() as live, store.index.read() as index:
        # Copied: a transaction left open while the caller works would keep all old pages alive.
        memory, disk = dict(live.scan("chunk")), dict(index.scan("chunk"))
    for key in sorted(memory.keys() | disk.keys()):
        try:
            row = Row.unpack(memory.get(key) or disk[key])
        except ValueError:
            continue  # verify reports it
        if chosen is None or chosen(key, row):
            yield Listed(
                key, row, tuple(t for t, rows in ((MEMORY, memory), (DISK, disk)) if key in rows)
            )


def remove(store: Store, chosen: Selection, progress: Progress | None = None) -> int:
    """Delete the selected chunks from every tier; returns how many there were."""
    keys = [listed.key for listed in list_chunks(store, chosen)]
    for at in range(0, len(keys), _BATCH):
        store.on_keeper(partial(store.remove_now, keys[at : at + _BATCH]))
        if progress is not None:
            progress(min(at + _BATCH, len(keys)), len(keys))
    return len(keys)


def empty_memory(store: Store, deadline_s: float = 60.0) -> int:
    """Write what is not yet on disk, then free the memory tier; returns chunks freed.

    Pinned and leased chunks stay. Without a disk tier the chunks are gone: it is a cache.
    """
    end = time.monotonic() + deadline_s
    store.drain(deadline_s)
    store.keeper.forget_promotions()
    freed = 0
    while freed_now := store.live.write(lambda txn: _drop_some(store, txn)):
        freed += freed_now
    give_back_free(store, MEMORY, end)
    return freed


def give_back_free(store: Store, tier: int, end: float) -> None:
    """Return the space of a tier's free slots to the file system, until ``end`` (monotonic)."""
    if tier == MEMORY:
        time.sleep(PUNCH_AFTER_S)  # until no late reader can be in one of the slots

    def some(txn: Txn) -> bool:
        return sum(store.ledger.give_back_one(txn, tier) for _ in range(_GIVE_BACK_SLOTS)) > 0

    while time.monotonic() < end and store.live.write(some):
        pass


def _drop_some(store: Store, txn: Txn) -> int:
    chosen = store.ledger.victims(txn, MEMORY, _DROP_BYTES)
    for key, _ in chosen:
        store.ledger.drop_memory(txn, key)
    return len(chosen)


def pin(store: Store, chosen: Selection, pinned: bool = True) -> tuple[int, int]:
    """Exempt the selected chunks from eviction, or not. Returns (done, refused for room)."""
    keys, done = [listed.key for listed in list_chunks(store, chosen)], 0
    for at in range(0, len(keys), _BATCH):
        done += len(set_pins(store, keys[at : at + _BATCH], pinned))
    return done, len(keys) - done


def stats(store: Store) -> dict[str, Any]:
    """Numbers of the store, with stable keys."""
    with store.live.read() as txn:
        counters = {
            name.decode(): int.from_bytes(value, "little") for name, value in txn.scan("counter")
        }
        tiers = {TIER_NAMES[tier]: _tier_stats(store, txn, tier) for tier in (MEMORY, DISK)}
        leases, pending = txn.count("lease"), txn.count("pending")
        usage = list(txn.scan("usage", b"n"))
    spaces = []
    for record in store.namespaces():
        used = {TIER_NAMES[name[1]]: int.from_bytes(value, "little")
                for name, value in usage if name[2:] == record.identity.namespace}  # fmt: skip
        spaces.append(
            {
                "namespace": record.identity.namespace_hex,
                "identity": json.loads(record.identity.to_json()),
                "kv": record.identity.stored_as,
                "chunk_bytes": record.layout.payload_bytes,
                "bytes": used,
            }
        )
    return {
        "folder": str(store.folder),
        "memory_dir": str(store.live_dir),
        "tiers": tiers,
        "namespaces": spaces,
        "leases": leases,
        "pending": pending,
        "counters": counters,
    }


def _tier_stats(store: Store, txn: Txn, tier: int) -> dict[str, int]:
    prefix = b"%c" % tier
    chunks = sum(1 for _ in txn.scan("heat", prefix))
    free = sum(unpack_address(name)[1] for name, _ in txn.scan("free", prefix))
    return {
        "cap_bytes": txn.get_int("meta", b"cap%d" % tier),
        "index_bytes": (store.live if tier == MEMORY else store.index).file_bytes(),
        "allocated_bytes": store.ledger.allocated(txn, tier),
        "free_bytes": free,
        "pinned_bytes": txn.get_int("meta", b"pinned%d" % tier),
        "chunks": chunks,
        "dirty_chunks": txn.count("dirty") if tier == MEMORY else 0,
    }


@dataclass
class Report:
    """What `verify` found."""

    chunks: dict[str, int] = field(default_factory=lambda: {"memory": 0, "disk": 0})
    damaged: list[dict[str, str]] = field(default_factory=list)
    unread: list[dict[str, str]] = field(default_factory=list)  # and so not checked
    accounting: list[str] = field(default_factory=list)
    segments: dict[str, int] = field(default_factory=dict)  # what is wrong -> chunks
    fixed: int = 0

    @property
    def sound(self) -> bool:
        """Nothing wrong was found."""
        return not (self.damaged or self.unread or self.accounting or self.segments)


def verify(store: Store, *, fix: bool = False, progress: Progress | None = None) -> Report:
    """Read all of both tiers and check it. With ``fix`` drop what is damaged, index the rest."""
    report = Report()
    listed = list(list_chunks(store))
    total, done = sum(len(item.tiers) for item in listed), 0
    for item in listed:
        for tier in item.tiers:
            done += 1
            data = _row_data(store, tier, item.key)
            if data is None:
                continue  # evicted since it was listed
            report.chunks[TIER_NAMES[tier]] += 1
            found = report.damaged
            try:
                why = fault(store, tier, item.key, data)
            except OSError as error:
                why, found = str(error), report.unread
            if why and _row_data(store, tier, item.key) == data:
                found.append({"key": item.key.hex(), "tier": TIER_NAMES[tier], "why": why})
                if fix and found is report.damaged:
                    report.fixed += store.on_keeper(partial(heal, store, tier, item.key, data))
            if progress is not None:
                progress(done, total)
    if fix:
        store.on_keeper(store.reap)
    for tier in (MEMORY, DISK):
        lost = rows_without_slot(store, tier)
        if lost and fix:
            store.on_keeper(partial(drop_rows, store, tier, lost))
            report.fixed += len(lost)
            lost = rows_without_slot(store, tier)
        if fix:
            report.fixed += store.live.write(partial(mend, store, tier=tier))
        report.accounting += [
            f"{TIER_NAMES[tier]}: {key.hex()}: {why}" for key, why in lost.items()
        ]
        with store.live.read() as txn:
            report.accounting += check_accounting(store.ledger, txn, tier)
    report.segments = check_segments(store, fix=fix)
    return report


def _row_data(store: Store, tier: int, key: bytes) -> bytes | None:
    with (store.live if tier == MEMORY else store.index).read() as txn:
        return txn.get("chunk", key)
