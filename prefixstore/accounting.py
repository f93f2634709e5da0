"""Whether rows, slots and counters belong together: the equation of the ledger (see `ledger`)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from prefixstore import config
from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY, TIER_NAMES, Entry, Ledger
from prefixstore.recovery import entry_of
from prefixstore.rows import Claim, Row, pack_address, unpack_address

if TYPE_CHECKING:
    from prefixstore.store import Store

_LOOK_AGAIN_S = 0.2


def rows_without_slot(store: Store, tier: int) -> dict[bytes, str]:
    """Rows and entries of the ledger that do not belong together, and why.

    They change in transactions of their own (`disk`, `lifetime`), so some differ for a moment while
    somebody writes: those that stay are reported. Our own change on the keeper thread.
    """
    wrong = _differing(store, tier)
    patient = config.OP_DEADLINE_S if wrong and store.liveness.others() else 0.0
    end = time.monotonic() + patient
    while wrong:
        again = store.on_keeper(partial(_differing, store, tier))
        wrong = {key: why for key, why in wrong.items() if again.get(key) == why}
        if time.monotonic() >= end:
            break
        time.sleep(_LOOK_AGAIN_S)
    return wrong


def _differing(store: Store, tier: int) -> dict[bytes, str]:
    wrong: dict[bytes, str] = {}
    with store.live.read() as live, store.index.read() as index:
        entries = dict(store.ledger.entries(live, tier))
        claimed = {Claim.unpack(record).key for _, record in live.scan("claim")}
        for key, data in (live if tier == MEMORY else index).scan("chunk"):
            entry = entries.pop(key, None)
            try:
                row = Row.unpack(data)
            except ValueError as error:
                wrong[key] = str(error)
                continue
            if key not in claimed and (why := _difference(row, entry)):
                wrong[key] = why
    wrong.update({key: "it has a slot but no row" for key in entries if key not in claimed})
    return wrong


def _difference(row: Row, entry: Entry | None) -> str:
    if entry is None or (row.slot_bytes, row.slot) != (entry.slot_bytes, entry.slot):
        return f"its row says slot {row.slot}, the ledger {entry and entry.slot}"
    for name, ours, theirs in zip(Entry._fields, entry_of(row), entry, strict=True):
        if ours != theirs:
            said = [value.hex() if isinstance(value, bytes) else value for value in (ours, theirs)]
            return f"its row says {name} {said[0]}, the ledger {said[1]}"
    return ""


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


def mend(store: Store, txn: Txn, tier: int) -> int:
    """Have every slot be one thing, and the counter say what the slots do; 1 if they did not.

    Slots that are in use are not free, and those that nobody has are. What the chunks say is taken
    for true: rows and entries that contradict each other are dropped before.
    """
    ledger = store.ledger
    if not check_accounting(ledger, txn, tier):
        return 0
    prefix = b"%c" % tier
    taken = {unpack_address(name) for name, _ in txn.scan("claim", prefix)}
    taken.update(ledger.occupied(txn, tier))
    taken.update(ledger.pending_slots(txn) if tier == MEMORY else ())
    spare, freed = set(), int(time.time() * 1000).to_bytes(8, "little")
    for table in ("free", "hole"):
        for name in [name for name, _ in txn.scan(table, prefix)]:
            if (address := unpack_address(name)) in taken or address in spare:
                txn.delete(table, name)
            spare.add(address)
    for name, value in list(txn.scan("pool", prefix)):
        size, top = int.from_bytes(name[1:], "big"), int.from_bytes(value, "little")
        for slot in range(min(top, store.file_of(tier, size).num_slots())):
            address = tier, size, slot
            if address not in taken and address not in spare:
                txn.put("free", pack_address(*address), freed)
    owned, _ = _owned(ledger, txn, tier)
    ledger.correct_allocated(txn, tier, sum(owned.values()) - ledger.allocated(txn, tier))
    return 1


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
