"""How long chunks are kept: changing the time to live of what is stored.

The row of each tier and the ledger's entry say when a chunk expires. Rows are changed first: who
reads them obeys at once, while the ledger's time only says when the keeper drops it. A crash in
between leaves a chunk that is dropped at its old time, or once its own is over and somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prefixstore import owned
from prefixstore.failpoints import reached
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef
from prefixstore.ledger import DISK, ENTRY, MEMORY, Entry, expiry_key
from prefixstore.putting import labels_for
from prefixstore.rows import NAMESPACE, readable

if TYPE_CHECKING:
    from prefixstore.namespace import Namespace


def set_ttl(namespace: Namespace, refs: Sequence[ChunkRef], ttl_s: float | None) -> int:
    """Have chunks expire so many seconds from now, or never. Returns how many there are.

    Raises ConfigError for what is no time, StoreTimeoutError, StoreClosedError.
    """
    store, expires_s = namespace.store, labels_for(ttl_s).expires_s
    store.check_open(namespace.name)

    def work() -> int:  # on the keeper thread: no copy between the tiers is under way
        keys = list(dict.fromkeys(owned.own_keys(namespace, refs)))

        def rows(txn: Txn) -> None:
            for key in keys:
                data = txn.get("chunk", key)
                row = readable(data) if data is not None else None
                if data is not None and data[NAMESPACE] == namespace.name and row is not None:
                    txn.put("chunk", key, replace(row, expires_s=expires_s).pack())

        def entries(txn: Txn) -> None:
            rows(txn)
            for key in keys:
                for tier in (MEMORY, DISK):
                    _set_entry(txn, tier, key, namespace.name, expires_s)
            reached("ttl.setting")

        if store.has_disk:
            store.index.write(rows)
            reached("ttl.rows")
        store.live.write(entries)
        return len(keys)

    return store.on_keeper(work)


def _set_entry(txn: Txn, tier: int, key: bytes, namespace: bytes, expires_s: int) -> None:
    heat = txn.get("heat", b"%c" % tier + key)
    if heat is None:
        return
    place = b"%c" % tier + heat[:8] + key
    data = txn.get("order", place)
    assert data is not None, "heat without a place in the order"
    entry = Entry(*ENTRY.unpack(data))
    if entry.namespace != namespace:
        return
    if entry.expires_s:
        txn.delete("expiry", expiry_key(entry.expires_s, tier, key))
    if expires_s:
        txn.put("expiry", expiry_key(expires_s, tier, key))
    txn.put("order", place, ENTRY.pack(*entry._replace(expires_s=expires_s)))
