"""How long chunks are kept: changing the time to live of what is stored.

The row of each tier and the ledger's entry say when a chunk expires. In memory both change in one
transaction, which also announces the change; then the durable rows, then, by those, the ledger of
the disk tier (`settling`). Of two who change it at once the later has its way in both tiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefixstore import owned
from prefixstore.failpoints import reached
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef
from prefixstore.ledger import MEMORY
from prefixstore.putting import labels_for
from prefixstore.rows import NAMESPACE, readable
from prefixstore.settling import announce, set_time, settle_announced

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

        def in_memory(txn: Txn) -> None:
            announce(store.ledger, txn, keys)
            for key in keys:
                entry = store.ledger.entry(txn, MEMORY, key)
                if entry is not None and entry.namespace == namespace.name:
                    set_time(store.ledger, txn, MEMORY, key, expires_s)

        def on_disk(txn: Txn) -> None:
            for key in keys:
                data = txn.get("chunk", key)
                row = readable(data) if data is not None else None
                if data is not None and data[NAMESPACE] == namespace.name and row is not None:
                    txn.put("chunk", key, row._replace(expires_s=expires_s).pack())

        def settle(txn: Txn) -> None:
            settle_announced(store.ledger, txn, keys, store.disk.durable_row)
            reached("ttl.settling")

        store.live.write(in_memory)
        reached("ttl.announced")
        store.index.write(on_disk)
        reached("ttl.rows")
        store.live.write(settle)
        return len(keys)

    return store.on_keeper(work)
