"""Promotion: a chunk that was read from disk is copied to the memory tier, so that the next read is
a memory read. Runs on the keeper thread, or on that of a request that waits before it reads. A
promotion that fails costs a slower hit, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from prefixstore.errors import StoreError
from prefixstore.failpoints import reached
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout, checksum
from prefixstore.ledger import DISK, MEMORY
from prefixstore.putting import PROMOTER, PutState, Putting
from prefixstore.reading import pieces_match, trusted_sums
from prefixstore.recovery import entry_of
from prefixstore.rows import FLAG_PAYLOAD_SUM, Pending, Row
from prefixstore.slots import aligned_buffer

if TYPE_CHECKING:
    from prefixstore.store import Store


def promote(store: Store, key: bytes) -> bool:
    """Copy one chunk from disk to memory; False when it cannot or need not be done."""
    row = store.disk.durable_row(key)
    if row is None:
        return False
    with store.live.read() as txn:
        if store.ledger.entry(txn, MEMORY, key) is not None:
            return False
    layout = store.layout_of(row.namespace)
    if row.slot_bytes != layout.slot_bytes:
        return False  # damaged
    ref = ChunkRef(key, row.preimage, row.depth, row.salt)
    # As a writer of its own group: if an engine is storing the same chunk now, leave it to it.
    putting = Putting(store.ledger, layout, row.namespace, PROMOTER, has_disk=False)
    quota = store.quotas.of(MEMORY)
    pieces = layout.piece_indices(layout.whole)
    [(state, slot)] = store.live.write(
        lambda txn: putting.begin(txn, [ref], pieces, quota, time.time())
    )
    if state is not PutState.WRITING:
        return False
    reached("promote.claimed")
    try:
        return _fill(store, putting, row, ref, slot)
    finally:
        putting.ended([(key, slot)])


def _fill(store: Store, putting: Putting, row: Row, ref: ChunkRef, slot: int) -> bool:
    """Copy it to the slot that is claimed for it; whether it is there."""
    key = ref.key
    data, ended = None, False
    try:
        with suppress(OSError):
            data = _copied(store, putting.layout, row, key, slot)
        ended = True
    finally:
        if not ended:
            with suppress(StoreError):
                store.live.submit(lambda txn: putting.abandon(txn, [(ref, slot)]))
    if data is None:
        store.live.write(lambda txn: putting.abandon(txn, [(ref, slot)]))
        return False
    reached("promote.copied")

    def commit(txn: Txn) -> bool:
        record = txn.get("pending", key)
        if record is None or (pending := Pending.unpack(record)).slot != slot:
            return False  # reaped meanwhile
        # Deleted or replaced meanwhile: do not bring it back. Who deletes takes the entry first and
        # the row later.
        entry = store.ledger.entry(txn, DISK, key)
        announced = txn.first("unsettled", key) is not None
        if announced or entry != entry_of(row) or store.disk.durable_row(key) != row:
            putting.abandon(txn, [(ref, slot)])
            return False
        store.ledger.end_pending(txn, key, pending)
        txn.put("chunk", key, row.at(slot).pack())
        store.ledger.insert(txn, MEMORY, key, entry_of(row.at(slot)))
        store.ledger.set_pinned(txn, MEMORY, key, row.pinned)
        reached("promote.committing")
        return True

    done = store.live.write(commit)
    reached("promote.committed")
    store.keeper.count("chunks_promoted", done)
    return done


def promote_in_order(store: Store, keys: Sequence[bytes], wanted: Callable[[], bool]) -> int:
    """Promote chunks one by one, as long as they are ``wanted``; how many. Raises StoreError."""
    count = 0
    for key in keys:
        if not wanted():
            break
        count += promote(store, key)
    return count


def _copied(store: Store, layout: Layout, row: Row, key: bytes, slot: int) -> memoryview | None:
    """What was copied to a slot of the memory tier; None if it is damaged. Raises OSError."""
    data = _read_whole(store, layout, row, key)
    if data is not None:
        store.file_of(MEMORY, row.slot_bytes).write(slot, data)
    return data


def _read_whole(store: Store, layout: Layout, row: Row, key: bytes) -> memoryview | None:
    """A whole slot of the disk tier, checked; None when it is damaged (a read will heal it)."""
    data = aligned_buffer(row.slot_bytes)
    store.file_of(DISK, row.slot_bytes).read(row.slot, [layout.slot_run], data)
    payload, trailer = data[: layout.payload_bytes], layout.trailer_run.in_slot(data)
    if row.flags & FLAG_PAYLOAD_SUM:  # one hash for all of it holds up no other thread
        right = checksum(payload) == row.payload_sum and trusted_sums(key, row, trailer) is not None
    else:
        right = pieces_match(layout, key, row, payload, layout.whole, trailer)
    return data if right else None
