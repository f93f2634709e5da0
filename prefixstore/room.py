"""Room ahead of need, off a put's path; and tiers that are over their cap brought below it.

A tier's cap counts its index, which grows by itself. What goes first: chunks that nobody has a
quota for, then all but pinned ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefixstore import config
from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY

if TYPE_CHECKING:
    from prefixstore.store import Store


def make_room(store: Store) -> None:
    """Evict what should go now (keeper thread)."""
    with store.live.read() as txn:
        over = {tier: _over(store, txn, tier) for tier in (MEMORY, DISK)}
    wanted, must = over[DISK]
    for of in (store.quotas.ungrouped(DISK), None):
        must -= store.disk.evict(wanted, of) if wanted > 0 else 0
        wanted = must
    if any(wanted for wanted, _ in over.values()):
        store.live.write(lambda txn: _shrink(store, txn, *over[MEMORY]))


def _over(store: Store, txn: Txn, tier: int) -> tuple[int, int]:
    """Bytes to evict now, and those of them that the tier is over its cap: back to the low mark
    once it is above the high one and has no free slot left."""
    used, cap = store.ledger.allocated(txn, tier), store.ledger.cap(txn, tier)
    must = max(0, used - cap)
    above = used > config.HIGH_SHARE * cap and txn.first("free", b"%c" % tier) is None
    return int(used - config.LOW_SHARE * cap) if above else must, must


def _shrink(store: Store, txn: Txn, wanted: int, must: int) -> None:
    ledger = store.ledger
    for of in (store.quotas.ungrouped(MEMORY), None):
        for key, entry in ledger.victims(txn, MEMORY, wanted, of):
            ledger.drop_memory(txn, key)
            must -= entry.slot_bytes
        wanted = must
    for tier in (MEMORY, DISK):
        ledger.trim(txn, tier)
