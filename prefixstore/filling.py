"""The copy of a put: from the caller's buffers into slots of the memory tier."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from prefixstore.errors import StoreError
from prefixstore.failpoints import reached
from prefixstore.healing import Suspect
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef
from prefixstore.layout import Buffer, Layout, Roi, checksum, pack_sums
from prefixstore.ledger import MEMORY
from prefixstore.putting import Labels, Part, PutState, Putting
from prefixstore.reading import helpers_for, share_out

if TYPE_CHECKING:
    from prefixstore.store import Store

Sums = npt.NDArray[np.uint64]  # xxh3_64 of each piece of a region, in order


def put_batch(
    store: Store,
    putting: Putting,
    refs: Sequence[ChunkRef],
    buffers: Sequence[Buffer],
    sums: Sequence[Sums | None],
    roi: Roi,
    labels: Labels,
    deadline_s: float,
) -> list[PutState]:
    """Store a batch of chunks, or regions of them, in the memory tier: one transaction to claim
    slots, the copies, one to commit. Whatever fails, no claim is left behind. ``sums``: of each
    buffer's pieces, where the caller has them."""
    layout = putting.layout
    quota = store.quotas.of(MEMORY)
    pieces = layout.piece_indices(roi)
    begun: list[tuple[PutState, int]] = []
    ended = False

    def begin(txn: Txn) -> None:
        begun[:] = putting.begin(txn, refs, pieces, quota, time.time())
        reached("put.claiming")

    def abandon(txn: Txn, failed: Container[int]) -> None:  # in the lane: then `begun` is known
        claimed = [i for i, (state, _) in enumerate(begun) if state is PutState.WRITING]
        putting.abandon(txn, [(refs[i], begun[i][1]) for i in claimed if i in failed])

    try:
        store.live.write(begin, deadline_s)
        reached("put.claimed")
        parts: dict[int, Part] = {}
        states = [state for state, _ in begun]
        _note_rowless(store, putting, [ref for ref, at in zip(refs, begun, strict=True)
                                       if at[0] is PutState.EXISTS])  # fmt: skip
        writing = [i for i, (state, _) in enumerate(begun) if state is PutState.WRITING]

        def copy(number: int) -> None:
            i = writing[number]
            try:
                ref, slot = refs[i], begun[i][1]
                parts[i] = fill(store, layout, ref, slot, buffers[i], sums[i], roi, pieces)
            except OSError:  # the file system of memory_dir is full, or no file can be opened
                states[i] = PutState.FULL

        num_bytes = len(writing) * layout.roi_bytes(roi)
        share_out(len(writing), copy, store.helpers, helpers_for(num_bytes))
        reached("put.copied")
        filled = sorted(parts)
        copied = [parts[i] for i in filled]
        done = _finish(store, putting, copied, labels, deadline_s) if copied else []
        ended = True
        reached("put.finished")
    finally:
        if not ended:
            # Whether the write that failed was made or not: the lane keeps the order, and what is
            # abandoned twice is abandoned.
            with suppress(StoreError):
                store.live.submit(partial(abandon, failed=range(len(refs))))
    for i, state in zip(filled, done, strict=True):
        states[i] = state
    failed = {i for i, state in enumerate(states) if state is PutState.FULL}
    if failed:
        store.live.write(partial(abandon, failed=failed), deadline_s)
    if store.has_disk:
        store.keeper.spill([refs[i].key for i in parts if states[i] is PutState.STORED])
    return states


def _finish(
    store: Store, putting: Putting, parts: list[Part], labels: Labels, deadline_s: float
) -> list[PutState]:
    file = store.file_of(MEMORY, putting.layout.slot_bytes)  # is open: `fill` wrote to it

    def finish(txn: Txn) -> list[PutState]:
        done = putting.finish(txn, parts, labels, file, int(time.time()))
        reached("put.finishing")
        return done

    return store.live.write(finish, deadline_s)


def _note_rowless(store: Store, putting: Putting, refs: Sequence[ChunkRef]) -> None:
    """The ledger says these exist. Where no index has a row, somebody must look: else they could
    never be stored again."""
    if not refs:
        return
    with store.live.lookup("chunk") as in_memory, store.index.lookup("chunk") as on_disk:
        for ref in refs:
            if in_memory(ref.key) is None and on_disk(ref.key) is None:
                lost = Suspect(MEMORY, ref.key, b"", putting.namespace, ref.preimage)
                store.keeper.suspects.note(lost)


def fill(
    store: Store,
    layout: Layout,
    ref: ChunkRef,
    slot: int,
    buffer: Buffer,
    known: Sums | None,
    roi: Roi,
    pieces: Sequence[int],
) -> Part:
    """Copy one region into its slot. The checksums are of the source, never of the copy; those that
    are ``known`` may be of what the buffer was copied from."""
    file = store.file_of(MEMORY, layout.slot_bytes)
    source = memoryview(buffer).cast("B")
    for run in layout.runs(roi):
        file.write(slot, run.in_buffer(source), run.slot_offset)
    sums = layout.piece_sums(source) if known is None else known.tolist()
    if roi != layout.whole:
        return Part(ref, slot, pieces, sums)
    trailer = layout.trailer(ref.key, pack_sums(sums))
    file.write(slot, layout.padded(trailer), layout.payload_bytes)
    return Part(ref, slot, pieces, sums, None if known is not None else checksum(source), trailer)
