"""Room ahead of need, off a put's path; and tiers that are over their cap brought below it.

What goes first: chunks that nobody has a quota for; then, where a tier is over its cap, all others
but pinned ones; then, where it still is, these. That is where the cap was lowered, or where the
index, which is part of it, has grown. A pinned chunk that leaves memory stays on disk, and pinned.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from prefixstore import config
from prefixstore.index import Txn
from prefixstore.ledger import DISK, ENTRY, MEMORY, RANK_PINNED, Entry, Ledger
from prefixstore.rows import CLAIM_HELD, Claim, unpack_address

if TYPE_CHECKING:
    from prefixstore.store import Store


def make_room(store: Store) -> None:
    """Evict what should go now (keeper thread)."""
    with store.live.read() as txn:
        over = {tier: _over(store, txn, tier) for tier in (MEMORY, DISK)}
    wanted, must, _ = over[DISK]
    disk, quotas = store.disk, store.quotas
    pinned = 0
    for evict in (
        partial(disk.evict, of=quotas.ungrouped(DISK)), disk.evict, disk.evict_pinned
    ):  # fmt: skip
        pinned = evict(wanted) if wanted > 0 else 0
        must -= pinned
        wanted = must
    if any(wanted or too_much for wanted, _, too_much in over.values()):
        pinned += store.live.write(lambda txn: _shrink(store, txn, *over[MEMORY][:2]))
    if pinned:
        store.keeper.count("pinned_evicted_bytes", pinned)


def pinned_victims(
    ledger: Ledger, txn: Txn, tier: int, need_bytes: int
) -> list[tuple[bytes, Entry]]:
    """Pinned chunks to evict where nothing else is left, ends of prompts first."""
    prefix = b"%c" % tier + RANK_PINNED.to_bytes(8, "big")
    found = [
        (name[9:], Entry(*ENTRY.unpack(value)))
        for name, value in islice(txn.scan("order", prefix), config.SWEEP_ROWS_MAX)
    ]
    chosen: list[tuple[bytes, Entry]] = []
    for key, entry in sorted(found, key=lambda one: -one[1].depth):
        if need_bytes > 0 and not ledger.is_held(txn, tier, key, entry):
            chosen.append((key, entry))
            need_bytes -= entry.slot_bytes
    return chosen


def _over(store: Store, txn: Txn, tier: int) -> tuple[int, int, bool]:
    """Bytes to evict now, those of them that the tier is over its cap, and whether it is: back to
    the low mark once it is above the high one and has no free slot left."""
    used, cap = store.ledger.allocated(txn, tier), store.ledger.cap(txn, tier)
    must = max(0, used - cap)
    if must:  # slots that are free wait a while until they are given back
        free = sum(unpack_address(name)[1] for name, _ in txn.scan("free", b"%c" % tier))
        must = max(0, must - free)
    above = used > config.HIGH_SHARE * cap and not _has_spare(txn, tier)
    return int(used - config.LOW_SHARE * cap) if above else must, must, used > cap


def _has_spare(txn: Txn, tier: int) -> bool:
    """Whether a slot is free, or will be in a moment (`holding`)."""
    if txn.first("free", b"%c" % tier) is not None:
        return True
    claims = (Claim.unpack(record) for _, record in txn.scan("claim", b"%c" % tier))
    return any(claim.kind == CLAIM_HELD for claim in claims)


def _shrink(store: Store, txn: Txn, wanted: int, must: int) -> int:
    """Drop chunks from memory; returns bytes of pinned ones."""
    ledger, pinned = store.ledger, 0
    for choose in (
        partial(ledger.victims, of=store.quotas.ungrouped(MEMORY)),
        ledger.victims,
        partial(pinned_victims, ledger),
    ):
        pinned = 0
        for key, entry in choose(txn, MEMORY, wanted):
            ledger.drop_memory(txn, key)
            pinned += entry.slot_bytes
        must -= pinned
        wanted = must
    for tier in (MEMORY, DISK):
        ledger.trim(txn, tier)
    return pinned
