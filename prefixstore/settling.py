"""Settling: what the ledger says of chunks on disk is brought in line with their durable rows.

Row and entry lie in two indexes, so no transaction changes both. Who changes rows of chunks that it
has not claimed announces them first, in the live index, and settles them after: the row decides. If
it was killed in between, or an error ended it, the keeper of any process does it
(`recovery.reap`). So nothing stays different for longer than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prefixstore.index import Txn
from prefixstore.ledger import DISK, ENTRY, MEMORY, Ledger, expiry_key
from prefixstore.rows import Row, readable

DurableRow = Callable[[bytes], Row | None]
KEY = slice(0, 16)  # of an announcement; the process follows


def announce(ledger: Ledger, txn: Txn, keys: Sequence[bytes]) -> None:
    """The durable rows of these chunks are about to change."""
    for key in keys:
        txn.put("unsettled", key + ledger.mark)


def settle_announced(
    ledger: Ledger, txn: Txn, keys: Sequence[bytes], durable_row: DurableRow
) -> int:
    """They have changed: settle them. Returns bytes freed on disk."""
    freed = 0
    for key in keys:
        freed += settle(ledger, txn, key, durable_row(key))
        txn.delete("unsettled", key + ledger.mark)
    return freed


def settle(ledger: Ledger, txn: Txn, key: bytes, row: Row | None) -> int:
    """Free the slot of a chunk on disk that has no row, and returns its bytes; else have both tiers
    keep the chunk as long as its row says.

    A row exists wherever there is an entry, but while somebody who has announced it is at work.
    """
    entry = ledger.entry(txn, DISK, key)
    if row is None:
        if entry is None:
            return 0
        ledger.detach(txn, DISK, key)
        ledger.free_slot(txn, DISK, entry.slot_bytes, entry.slot)
        return entry.slot_bytes
    if entry is not None and (entry.slot, entry.namespace) == (row.slot, row.namespace):
        set_time(ledger, txn, DISK, key, row.expires_s)
    in_memory = ledger.entry(txn, MEMORY, key)
    if in_memory is not None and in_memory.namespace == row.namespace:
        set_time(ledger, txn, MEMORY, key, row.expires_s)
    return 0


def set_time(ledger: Ledger, txn: Txn, tier: int, key: bytes, expires_s: int) -> None:
    """When a chunk expires in a tier, by the ledger and, in memory, by its row."""
    entry, heat = ledger.entry(txn, tier, key), txn.get("heat", b"%c" % tier + key)
    if entry is None or heat is None or entry.expires_s == expires_s:
        return
    if entry.expires_s:
        txn.delete("expiry", expiry_key(entry.expires_s, tier, key))
    if expires_s:
        txn.put("expiry", expiry_key(expires_s, tier, key))
    place = b"%c" % tier + heat[:8] + key
    txn.put("order", place, ENTRY.pack(*entry._replace(expires_s=expires_s)))
    data = txn.get("chunk", key) if tier == MEMORY else None
    row = readable(data) if data is not None else None
    if row is not None:
        txn.put("chunk", key, row._replace(expires_s=expires_s).pack())
