"""Lending: chunks for callers that check them themselves, as a GPU does.

It reads the memory tier by DMA and hashes what it received; no host copy is made (`lend`). What is
lent may be reused at any time unless it is leased, so only what the receiver has hashed may be
used, and only if it is what `Lent.sums` says: these were read from a trailer that the chunk's row
vouches for. What it cannot reach is read for it, and so it is with that (`get_unchecked`).

Who pins a slot's pages holds their memory, also when the slot's space is given back: the tier would
take more than it was given. So each time that happens is counted, and whoever pins pages compares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from prefixstore.filling import version_of, versions_of
from prefixstore.fronted import FrontedNamespace
from prefixstore.getting import get_by
from prefixstore.index import Txn
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout, Roi
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import Namespace
from prefixstore.reading import read_trailer, trusted_sums
from prefixstore.rows import Row, pack_address, readable
from prefixstore.slots import SlotFile
from prefixstore.store import Store


@dataclass(frozen=True, slots=True)
class Lent:
    """A chunk in its slot, and the xxh3_64 of each piece of the region, in order; none where the
    slot is to be filled, or only registered."""

    store: Store
    file: SlotFile
    slot: int
    version: int  # of its pages: how often its space has been given back
    sums: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))


def lend(namespace: Namespace, refs: Sequence[ChunkRef], roi: Roi) -> list[Lent]:
    """The leading chunks that are in the memory tier and whose row and trailer agree.

    Ends at the first that is not; `Namespace.get` then says why, and heals what is damaged. Raises
    StoreClosedError.
    """
    store, layout = namespace.store, namespace.layout
    store.check_open(namespace.name)
    with store.live.read() as txn:
        rows = _rows(namespace, refs, txn)
        of_pages = versions_of(txn, layout.slot_bytes, [row.slot for row in rows])
    run, indices = layout.trailer_run, _indices(layout, roi)
    lent: list[Lent] = []
    for ref, row, version in zip(refs, rows, of_pages, strict=False):
        try:
            file = store.file_of(MEMORY, row.slot_bytes)
            trailer = bytes(run.in_slot(file.view(row.slot)))
        except OSError:
            break
        table = trusted_sums(ref.key, row, memoryview(trailer))
        if table is None:
            break
        lent.append(Lent(store, file, row.slot, version, np.frombuffer(table, "<u8")[indices]))
        store.keeper.touched(MEMORY, ref.key)
    return lent


def get_unchecked(
    namespace: Namespace,
    refs: Sequence[ChunkRef],
    outs: Sequence[memoryview],
    roi: Roi,
    sums: list[npt.NDArray[np.uint64] | None],
    progress: Callable[[], None] | None = None,
) -> list[int]:
    """`Namespace.get` for a caller that hashes what it got: a buffer holds its chunk only if the
    xxh3_64 of the pieces of the region are ``sums[i]``, which is set when ``outs[i]`` is full and
    stays as it is for a miss.

    Of those that are not, `Namespace.get` says why, and heals what is damaged. ``progress`` may
    look at ``sums``: other threads set them, too. Raises LayoutError, StoreClosedError.
    """
    layout = namespace.layout
    runs, indices = layout.runs(roi), _indices(layout, roi)

    def read(i: int, out: memoryview, file: SlotFile, row: Row) -> bool:
        file.read(row.slot, runs, out)
        table = trusted_sums(refs[i].key, row, read_trailer(file, layout, row))
        if table is None:
            return False
        sums[i] = np.frombuffer(table, "<u8")[indices]
        return True

    return get_by(namespace, refs, outs, roi, read, progress)


def note_use(namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
    """Chunks were used of which somebody has a copy: it keeps them in the folder of the store, if
    there is one, from which look-ups must find them."""
    near = namespace.front if isinstance(namespace, FrontedNamespace) else namespace
    if isinstance(near, Namespace):
        for ref in refs:
            for tier in (MEMORY, DISK):  # where a chunk is not, it makes no difference
                near.store.keeper.touched(tier, ref.key)


@lru_cache(maxsize=16)
def _indices(layout: Layout, roi: Roi) -> npt.NDArray[np.int64] | slice:
    """A region's pieces in the table of checksums: hundreds, and the same ones each time."""
    return slice(None) if roi == layout.whole else np.array(layout.piece_indices(roi), np.int64)


def _rows(namespace: Namespace, refs: Sequence[ChunkRef], txn: Txn) -> list[Row]:
    """Those of leading chunks that are there."""
    found, now_s = txn.get_many("chunk", sorted(ref.key for ref in refs)), time.time()
    rows: list[Row] = []
    for ref in refs:
        data = found.get(ref.key)
        row = None if data is None else readable(data)
        if row is None or row.namespace != namespace.name or 0 < row.expires_s <= now_s:
            break
        if ref.preimage and row.preimage != ref.preimage:
            break
        if row.slot_bytes != namespace.layout.slot_bytes:
            break
        rows.append(row)
    return rows


def keeps_its_pages(lent: Lent) -> bool:
    """Whether its slot has the pages that were lent, and will for PUNCH_AFTER_S: a free slot may
    lose them any time. Raises StoreError."""
    slot_bytes, slot = lent.file.slot_bytes, lent.slot
    with lent.store.live.read() as txn:
        same = version_of(txn, slot_bytes, slot) == lent.version
        return same and txn.get("free", pack_address(MEMORY, slot_bytes, slot)) is None


def times_given_back(store: Store) -> int:
    """How often space of any slot was given back: where it is the same, no version has changed.
    Raises StoreError."""
    with store.live.read() as txn:
        return txn.get_int("meta", b"punched")


def versions(store: Store, slot_bytes: int, slots: Sequence[int]) -> list[int]:
    """Those of the pages of slots now. Raises StoreError."""
    with store.live.read() as txn:
        return versions_of(txn, slot_bytes, slots)
