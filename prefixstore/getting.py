"""What every get of a namespace does, however the bytes are read and checked.

A chunk is read from the first tier that has it whole. What cannot be read is told apart: expired,
another's by the same key, moved on meanwhile, or damaged, which is healed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from prefixstore.errors import LayoutError
from prefixstore.healing import explain_miss, is_anothers
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.ledger import DISK, MEMORY
from prefixstore.reading import helpers_for, share_out
from prefixstore.rows import Row, readable
from prefixstore.slots import SlotFile

if TYPE_CHECKING:
    from prefixstore.namespace import Namespace

MISS = 0

Read = Callable[[int, memoryview, SlotFile, Row], bool]


def get_by(
    namespace: Namespace,
    refs: Sequence[ChunkRef],
    outs: Sequence[memoryview],
    roi: Roi,
    read: Read,
    progress: Callable[[], None] | None = None,
) -> list[int]:
    """`Namespace.get` for a caller that reads the slots itself.

    ``read(i, out, file, row)`` reads the region of chunk ``i`` from its slot, in one of several
    threads; False or OSError: it is not what the row says. Raises LayoutError, StoreClosedError.
    """
    store, layout = namespace.store, namespace.layout
    store.check_open(namespace.name)
    layout.check(roi)
    size = layout.roi_bytes(roi)
    if len(outs) != len(refs):
        raise LayoutError(f"{len(outs)} buffers for {len(refs)} chunks", "give one for each")
    for out in outs:
        if out.nbytes != size or out.readonly:
            kind = "read-only " if out.readonly else ""
            raise LayoutError(f"a {kind}buffer of {out.nbytes} bytes", f"{size} writable needed")
    with store.live.lookup("chunk") as in_memory, store.index.lookup("chunk") as on_disk:
        rows = [(in_memory(ref.key), on_disk(ref.key)) for ref in refs]
    result = [MISS] * len(refs)

    def get(i: int) -> None:
        read_slot = partial(read, i, outs[i].cast("B"))
        result[i] = _first_whole(namespace, refs[i], *rows[i], read_slot)

    share_out(len(refs), get, store.helpers, helpers_for(len(refs) * size), progress)
    for ref, tier in zip(refs, result, strict=True):
        if tier != MISS:
            store.keeper.touched(tier, ref.key)
        if tier == DISK:
            store.keeper.promote(ref.key)
    return result


def _first_whole(
    namespace: Namespace,
    ref: ChunkRef,
    memory_row: bytes | None,
    disk_row: bytes | None,
    read: Callable[[SlotFile, Row], bool],
) -> int:
    """Read one chunk from the first tier that has it whole; that tier, or MISS."""
    store = namespace.store
    for tier, data in ((MEMORY, memory_row), (DISK, disk_row)):
        if data is None:
            continue
        row = readable(data)
        if row is not None and row.expires_s and row.expires_s <= time.time():
            namespace.suspect(tier, ref.key, ref.preimage, data)
            continue
        whose = None if row is None else (row.namespace, ref.preimage and row.preimage)
        ours = whose == (namespace.name, ref.preimage)
        if whose and not ours and is_anothers(store, ref.key, ref.preimage, *whose):
            continue
        if row is not None and ours and row.slot_bytes == namespace.layout.slot_bytes:
            try:
                if read(store.file_of(tier, row.slot_bytes), row):
                    return tier
            except OSError:
                pass  # looked into below, like a wrong checksum
        explain_miss(store, tier, ref.key, data)
    return MISS
