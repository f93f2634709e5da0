"""Pins: chunks that are exempt from eviction, in both tiers.

In memory, rank and row change in one transaction. On disk the rows change first and the ledger
after: a copy to disk that is under way takes the flag from the row in memory, or has its row by
then. A crash in between leaves chunks whose row says that they are pinned, and which are not until
the next reboot: nothing was promised yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prefixstore.failpoints import reached
from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY, RANK_PINNED, Ledger
from prefixstore.rows import readable

if TYPE_CHECKING:
    from prefixstore.store import Store

Room = Callable[[Txn, int], float | None]  # bytes that may still be pinned in a tier; None: any


def set_pins(
    store: Store, keys: Sequence[bytes], pinned: bool, room: Room = lambda txn, tier: None
) -> set[bytes]:
    """Exempt chunks from eviction, or not; which are as asked in a tier they are in.

    Raises StoreTimeoutError, StoreClosedError.
    """

    def flag(txn: Txn, keys: Sequence[bytes], pinned: bool) -> None:
        for key in keys:
            data = txn.get("chunk", key)
            row = None if data is None else readable(data)
            if row is not None and row.pinned != pinned:
                txn.put("chunk", key, row.with_pin(pinned).pack())

    def rank(txn: Txn, tier: int) -> tuple[list[bytes], list[bytes]]:
        """Those that are as asked, and those for which there is no room."""
        left = room(txn, tier) if pinned else None
        done, refused = [], []
        for key in keys:
            size = 0 if left is None else _more_bytes(store.ledger, txn, tier, key)
            if (left is None or size <= left) and store.ledger.set_pinned(txn, tier, key, pinned):
                done.append(key)
                left = None if left is None else left - size
            elif store.ledger.entry(txn, tier, key) is not None:
                refused.append(key)
        return done, refused

    def in_memory(txn: Txn) -> list[bytes]:
        done, _ = rank(txn, MEMORY)
        flag(txn, done, pinned)
        return done

    def work() -> set[bytes]:  # on the keeper thread: no copy of ours is under way
        there = store.live.write(in_memory)
        store.index.write(lambda txn: flag(txn, keys, pinned))
        reached("pin.flagged")
        on_disk, refused = store.live.write(lambda txn: rank(txn, DISK))
        if refused:
            store.index.write(lambda txn: flag(txn, refused, False))
        return {*there, *on_disk}

    return store.on_keeper(work)


def _more_bytes(ledger: Ledger, txn: Txn, tier: int, key: bytes) -> int:
    """What pinning a chunk would add: 0 if it is pinned, or not there."""
    entry, heat = ledger.entry(txn, tier, key), txn.get("heat", b"%c" % tier + key)
    if entry is None or heat is None or heat[:8] == RANK_PINNED.to_bytes(8, "big"):
        return 0
    return entry.slot_bytes
