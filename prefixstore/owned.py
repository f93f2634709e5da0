"""What the server asks of a namespace by key: where bytes lie, and removing, pinning, explaining.

What must hold: nothing here speaks of, or changes, a chunk whose row is of another namespace; such
a key is treated as one that is not there, at the cost of one comparison. `locate` hands out places,
not bytes: who reads them checks them against the sums that come with it, because the slot may be
evicted and reused meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prefixstore.config import PIN_SHARE_MAX
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef
from prefixstore.layout import (
    TRAILER_HEAD_BYTES,
    TRAILER_MAGIC,
    Layout,
    Roi,
    Run,
    checksum,
)
from prefixstore.ledger import DISK, ENTRY, MEMORY, RANK_PINNED, Entry
from prefixstore.pinning import set_pins
from prefixstore.rows import FLAG_PAYLOAD_SUM, NAMESPACE, Pending, Row, readable
from prefixstore.slots import SlotFile
from prefixstore.wire import SUM_PIECES, SUM_WHOLE, Record

if TYPE_CHECKING:
    from prefixstore.namespace import Namespace


_PINNED = RANK_PINNED.to_bytes(8, "big")


@dataclass(frozen=True, slots=True)
class Region:
    """A region of a chunk as a reader asks for it: layers x heads, of all planes or of one."""

    layout: Layout
    roi: Roi
    plane: int | None = None  # 0: K, 1: V

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole payload."""
        return self.plane is None and self.roi == self.layout.whole

    def runs(self) -> list[Run]:
        """Contiguous runs, in the order of the reader's buffer."""
        layout, roi = self.layout, self.roi
        if self.plane is None:
            return layout.runs(roi)
        size = (roi.head_stop - roi.head_start) * layout.piece_bytes
        return [
            Run(
                ((layer * layout.num_planes + self.plane) * layout.num_heads + roi.head_start)
                * layout.piece_bytes,
                (layer - roi.layer_start) * size,
                size,
            )
            for layer in range(roi.layer_start, roi.layer_stop)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of it."""
        return sum(run.num_bytes for run in self.runs())

    def pieces(self) -> list[int]:
        """Indices of its pieces in the table of checksums, in the order of the buffer."""
        layout, heads = self.layout, range(self.roi.head_start, self.roi.head_stop)
        if self.plane is None:
            return layout.piece_indices(self.roi)
        return [
            (layer * layout.num_planes + self.plane) * layout.num_heads + head
            for layer in range(self.roi.layer_start, self.roi.layer_stop)
            for head in heads
        ]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a region of a chunk lies, and what it must hash to."""

    key: bytes
    file: SlotFile
    slot: int
    record: Record


def locate(ns: Namespace, refs: Sequence[ChunkRef], region: Region) -> list[Place | None]:
    """Where regions of chunks lie now; None: not there, or its checksums cannot be read.

    Reads indexes and, for a part of a chunk, its trailer. Raises StoreClosedError.
    """
    store = ns.store
    store.check_open(ns.name)
    with store.live.lookup("chunk") as in_memory, store.index.lookup("chunk") as on_disk:
        rows = [((MEMORY, in_memory(ref.key)), (DISK, on_disk(ref.key))) for ref in refs]
    return [
        next(
            (place for tier, data in found if (place := _place(ns, ref, tier, data, region))), None
        )
        for ref, found in zip(refs, rows, strict=True)
    ]


def _place(
    ns: Namespace, ref: ChunkRef, tier: int, data: bytes | None, region: Region
) -> Place | None:
    row = _own_row(ns, data)
    if row is None or (ref.preimage and row.preimage != ref.preimage) or _expired(row):
        return None
    if row.slot_bytes != ns.layout.slot_bytes:  # damaged: it would name another file
        return None
    file = ns.store.file_of(tier, row.slot_bytes)
    if region.is_whole and row.flags & FLAG_PAYLOAD_SUM:
        sums, kind = row.payload_sum, SUM_WHOLE
    else:
        trailer = memoryview(bytearray(ns.layout.trailer_bytes))
        try:
            file.read(row.slot, [ns.layout.trailer_run], trailer)
        except OSError:
            return None
        if checksum(trailer) != row.trailer_sum or trailer[:24] != TRAILER_MAGIC + ref.key:
            return None
        table = trailer[TRAILER_HEAD_BYTES:]
        sums = b"".join(table[8 * i : 8 * i + 8] for i in region.pieces())
        kind = SUM_PIECES
    return Place(ref.key, file, row.slot, Record(tier, kind, sums, region.num_bytes))


def _own_row(ns: Namespace, data: bytes | None) -> Row | None:
    if data is None or data[NAMESPACE] != ns.name:
        return None
    return readable(data)


def _expired(row: Row) -> bool:
    return 0 < row.expires_s <= time.time()


def own_keys(ns: Namespace, refs: Sequence[ChunkRef]) -> list[bytes]:
    """Keys of those chunks that are stored and are this namespace's."""
    store = ns.store
    with store.live.lookup("chunk") as in_memory, store.index.lookup("chunk") as on_disk:
        return [
            ref.key
            for ref in refs
            if _own_row(ns, in_memory(ref.key)) or _own_row(ns, on_disk(ref.key))
        ]


def in_memory(ns: Namespace, refs: Sequence[ChunkRef]) -> bool:
    """Whether `match` of chunks, and `locate` of whole ones, has to wait for no device."""
    with ns.store.live.lookup("chunk") as find:
        found = list(map(find, [ref.key for ref in refs]))
    # Another's chunk is as one that is not there, here as well: the answer shows in the time.
    rows = [row for row in found if row is not None and row[NAMESPACE] == ns.name]
    if len(rows) < len(refs):
        return not ns.store.has_disk
    return all(row[1] & FLAG_PAYLOAD_SUM for row in rows)


def delete(ns: Namespace, refs: Sequence[ChunkRef]) -> int:
    """Remove chunks from every tier; how many were there. Raises StoreTimeoutError."""
    keys = list(dict.fromkeys(own_keys(ns, refs)))
    if keys:
        ns.store.on_keeper(lambda: ns.store.remove_now(keys))
    return len(keys)


def pin(ns: Namespace, refs: Sequence[ChunkRef], pinned: bool) -> int:
    """Exempt chunks from eviction, or not; how many are as asked. Raises StoreTimeoutError.

    Whoever has a quota pins at most its share of that: pins of the tier are for everybody.
    """
    keys = list(dict.fromkeys(own_keys(ns, refs)))
    return len(set_pins(ns.store, keys, pinned, partial(_room_for_pins, ns)))


def _room_for_pins(ns: Namespace, txn: Txn, tier: int) -> float | None:
    """Bytes that may still be pinned by whoever has a quota; None: no bound but the tier's."""
    group = ns.store.quotas.of(tier).groups.get(ns.name)
    if group is None:
        return None
    pinned = (Entry(*ENTRY.unpack(value)) for _, value in txn.scan("order", b"%c" % tier + _PINNED))
    used = sum(one.slot_bytes for one in pinned if one.namespace in group.namespaces)
    return PIN_SHARE_MAX * group.limit_bytes - used


def prefetch(ns: Namespace, refs: Sequence[ChunkRef]) -> int:
    """Have chunks that are on disk only copied to memory soon; how many."""
    keys = own_keys(ns, refs)
    with ns.store.live.lookup("chunk") as in_memory:
        absent = [key for key in keys if in_memory(key) is None]
    for key in absent:
        ns.store.keeper.promote(key)
    return len(absent)


def why_missing(ns: Namespace, ref: ChunkRef) -> str:
    """Why `match` ends at a chunk: absent, expired, being_stored or other_content."""
    store = ns.store
    with store.live.read() as live, store.index.read() as index:
        rows = [_own_row(ns, live.get("chunk", ref.key)), _own_row(ns, index.get("chunk", ref.key))]
        record = live.get("pending", ref.key)
        pending = record is not None and Pending.unpack(record).namespace == ns.name
    found = [row for row in rows if row is not None]
    if not found:
        return "being_stored" if pending else "absent"
    if all(_expired(row) for row in found):
        return "expired"
    return "other_content" if found[0].preimage != ref.preimage else "stored"
