"""The numbers of a store that cost next to nothing to read, for whoever watches it.

`admin.stats` counts chunks one by one; what is here is a few dozen entries of the live index,
however many chunks there are, so it may be read every second. Nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefixstore import journal
from prefixstore.journal import Change
from prefixstore.ledger import DISK, MEMORY, TIER_NAMES
from prefixstore.registry import NamespaceRecord
from prefixstore.store import Store


@dataclass(frozen=True, slots=True)
class Used:
    """What one model's KV takes."""

    record: NamespaceRecord
    by_tier: dict[str, int]  # bytes of slots, those being filled included

    @property
    def model(self) -> str:
        """A name for people: architecture, digest of the weights, whether there is LoRA, and the
        codec that KV was rounded by."""
        identity = self.record.identity
        weights = identity.weights.rpartition(":")[2][:8]
        lora = " +LoRA" if identity.lora else ""
        return ", ".join(filter(None, (f"{identity.architecture} {weights}{lora}", identity.codec)))

    def to_json(self) -> dict[str, Any]:
        """Stable keys."""
        size = self.record.layout.slot_bytes
        return {
            "namespace": self.record.identity.namespace_hex,
            "model": self.model,
            "chunk_tokens": self.record.layout.chunk_tokens,
            "chunk_bytes": self.record.layout.payload_bytes,
            "bytes": self.by_tier,
            "chunks": {tier: count // size for tier, count in self.by_tier.items()},
        }


@dataclass(frozen=True, slots=True)
class Glance:
    """A store at one moment."""

    tiers: dict[str, dict[str, int]]
    spaces: list[Used]  # largest first
    counters: dict[str, int]
    leases: int
    being_stored: int


class Watcher:
    """Reads a store again and again, on one thread. Knows what it has seen."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._records: dict[bytes, NamespaceRecord] = {}
        with store.live.read() as txn:
            self._seen = journal.newest(txn)

    def changes(self) -> tuple[list[Change], int]:
        """What has come and gone since the last call, and how many changes were missed.

        Raises StoreClosedError.
        """
        self.store.check_open()
        with self.store.live.read() as txn:
            found, self._seen, missed = journal.since(txn, self._seen)
        return found, missed

    def glance(self) -> Glance:
        """The numbers now. Raises StoreClosedError."""
        store = self.store
        store.check_open()
        with store.live.read() as txn:
            counters = {
                name.decode(): int.from_bytes(value, "little")
                for name, value in txn.scan("counter")
            }
            usage = {name[1:]: int.from_bytes(value, "little")
                     for name, value in txn.scan("usage", b"n")}  # fmt: skip
            tiers = {}
            for tier, name in TIER_NAMES.items():
                used = sum(count for key, count in usage.items() if key[0] == tier)
                env = store.live if tier == MEMORY else store.index
                tiers[name] = {
                    "cap_bytes": txn.get_int("meta", b"cap%d" % tier),
                    "used_bytes": used,
                    "allocated_bytes": store.ledger.allocated(txn, tier),
                    "pinned_bytes": txn.get_int("meta", b"pinned%d" % tier),
                    "index_bytes": env.file_bytes(),
                    "unwritten_chunks": txn.count("dirty") if tier == MEMORY else 0,
                }
            leases, pending = txn.count("lease"), txn.count("pending")
        return Glance(tiers, self._spaces(usage), counters, leases, pending)

    def _spaces(self, usage: dict[bytes, int]) -> list[Used]:
        names = {key[1:] for key in usage}
        if not names <= self._records.keys():
            self._records = {one.identity.namespace: one for one in self.store.namespaces()}
        spaces = [
            Used(
                self._records[name],
                {TIER_NAMES[t]: usage.get(b"%c" % t + name, 0) for t in (MEMORY, DISK)},
            )
            for name in names & self._records.keys()
        ]
        return sorted(spaces, key=lambda one: (-sum(one.by_tier.values()), one.model))

    def record(self, namespace: bytes) -> NamespaceRecord | None:
        """What is known of a namespace; None if it is not there."""
        if namespace not in self._records:
            self._records = {one.identity.namespace: one for one in self.store.namespaces()}
        return self._records.get(namespace)
