"""Lending: where a chunk of the memory tier lies, for callers that copy it and check it themselves.

A GPU reads the tier by DMA and hashes what it received; no host copy is made. What is lent may be
reused at any time unless it is leased, so only what the receiver has hashed may be used, and only
if it is what `Lent.sums` says: these were read from a trailer that the chunk's row vouches for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout, Roi
from prefixstore.ledger import MEMORY
from prefixstore.namespace import Namespace
from prefixstore.reading import trusted_sums
from prefixstore.rows import readable
from prefixstore.slots import SlotFile


@dataclass(frozen=True, slots=True)
class Lent:
    """A chunk in its slot, and the xxh3_64 of each piece of the region, in order."""

    file: SlotFile
    slot: int
    sums: npt.NDArray[np.uint64]


def lend(namespace: Namespace, refs: Sequence[ChunkRef], roi: Roi) -> list[Lent]:
    """The leading chunks that are in the memory tier and whose row and trailer agree.

    Ends at the first that is not; `Namespace.get` then says why, and heals what is damaged. Raises
    StoreClosedError.
    """
    store, layout = namespace.store, namespace.layout
    store.check_open(namespace.name)
    with store.live.lookup("chunk") as in_memory:
        rows = [in_memory(ref.key) for ref in refs]
    indices = _indices(layout, roi)
    lent: list[Lent] = []
    for ref, data in zip(refs, rows, strict=True):
        row = None if data is None else readable(data)
        if row is None or row.namespace != namespace.name or 0 < row.expires_s <= time.time():
            break
        if ref.preimage and row.preimage != ref.preimage:
            break
        if row.slot_bytes != layout.slot_bytes:
            break
        try:
            file = store.file_of(MEMORY, row.slot_bytes)
            trailer = bytes(layout.trailer_run.in_slot(file.view(row.slot)))
        except OSError:
            break
        table = trusted_sums(ref.key, row, memoryview(trailer))
        if table is None:
            break
        lent.append(Lent(file, row.slot, np.frombuffer(table, "<u8")[indices]))
        store.keeper.touched(MEMORY, ref.key)
    return lent


@lru_cache(maxsize=16)
def _indices(layout: Layout, roi: Roi) -> npt.NDArray[np.int64]:
    """A region's pieces in the table of checksums: hundreds, and the same ones each time."""
    return np.array(layout.piece_indices(roi), np.int64)
