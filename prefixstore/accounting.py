"""Whether rows, slots and counters belong together: the equation of the ledger (see `ledger`)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY, TIER_NAMES, Ledger
from prefixstore.rows import Claim, Row, unpack_address

if TYPE_CHECKING:
    from prefixstore.store import Store

_LOOKS_AGAIN, _BETWEEN_LOOKS_S = 2, 0.02


def rows_without_slot(store: Store, tier: int) -> dict[bytes, str]:
    """Rows and entries of the ledger that do not belong together, and why.

    The two indexes are read one after the other, so a chunk that goes in between looks wrong.
    What is wrong at each of several looks, and in the same way, is.
    """
    wrong = _look_for_rows(store, tier)
    for _ in range(_LOOKS_AGAIN):
        if not wrong:
            break
        time.sleep(_BETWEEN_LOOKS_S)
        again = _look_for_rows(store, tier)
        wrong = {key: why for key, why in wrong.items() if again.get(key) == why}
    return wrong


def _look_for_rows(store: Store, tier: int) -> dict[bytes, str]:
    wrong: dict[bytes, str] = {}
    with store.live.read() as live, store.index.read() as index:
        places = dict(store.ledger.places(live, tier))
        claimed = {Claim.unpack(record).key for _, record in live.scan("claim")}
        for key, data in (live if tier == MEMORY else index).scan("chunk"):
            place = places.pop(key, None)
            try:
                row = Row.unpack(data)
            except ValueError as error:
                wrong[key] = str(error)
                continue
            if place != (row.slot_bytes, row.slot) and key not in claimed:
                wrong[key] = f"its row says slot {row.slot}, the ledger {place and place[1]}"
    wrong.update({key: "it has a slot but no row" for key in places if key not in claimed})
    return wrong


def drop_rows(store: Store, tier: int, wrong: dict[bytes, str]) -> None:
    """Drop them, so that they can be stored again."""
    if tier == DISK:
        store.disk.drop(list(wrong))
        return

    def drop(txn: Txn) -> None:
        for key in wrong:
            if not store.ledger.drop_memory(txn, key):
                txn.delete("chunk", key)

    store.live.write(drop)


def check_accounting(ledger: Ledger, txn: Txn, tier: int) -> list[str]:
    """What is wrong: a slot with two owners, or bytes that nobody owns."""
    owned, wrong = _owned(ledger, txn, tier)
    allocated = ledger.allocated(txn, tier)
    if sum(owned.values()) != allocated:
        parts = " + ".join(f"{size} {what}" for what, size in owned.items())
        wrong.append(f"{TIER_NAMES[tier]}: {allocated} bytes allocated, but {parts}")
    return wrong


def count_again(ledger: Ledger, txn: Txn, tier: int) -> int:
    """Have the counter say what the slots do; 1 if it did not."""
    owned, _ = _owned(ledger, txn, tier)
    wrong = sum(owned.values()) - ledger.allocated(txn, tier)
    ledger.correct_allocated(txn, tier, wrong)
    return int(wrong != 0)


def _owned(ledger: Ledger, txn: Txn, tier: int) -> tuple[dict[str, int], list[str]]:
    """Bytes of slots by what they are, and the slots that are two things."""
    prefix = b"%c" % tier
    owners: dict[tuple[int, int, int], str] = {}
    wrong: list[str] = []

    def own(addresses: Iterable[tuple[int, int, int]], what: str) -> int:
        total = 0
        for address in addresses:
            if address in owners:
                wrong.append(f"slot {address} is {what} and {owners[address]}")
                continue
            owners[address] = what
            total += address[1]
        return total

    pending = ledger.pending_slots(txn) if tier == MEMORY else ()
    return {
        "in use": own(ledger.occupied(txn, tier), "in use"),
        "free": own((unpack_address(name) for name, _ in txn.scan("free", prefix)), "free"),
        "claimed": own((unpack_address(name) for name, _ in txn.scan("claim", prefix)), "claimed"),
        "pending": own(pending, "pending"),
    }, wrong
