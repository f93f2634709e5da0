"""The copy of a put: from wherever the caller has the bytes into slots of the memory tier."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prefixstore import config
from prefixstore.errors import StoreError
from prefixstore.failpoints import reached
from prefixstore.healing import Suspect
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef
from prefixstore.layout import Buffer, Layout, Roi, Sums, checksum, pack_sums
from prefixstore.ledger import MEMORY
from prefixstore.putting import Labels, Part, PutState, Putting
from prefixstore.reading import share_out
from prefixstore.rows import pack_address
from prefixstore.slots import SlotFile

if TYPE_CHECKING:
    from prefixstore.store import Store


@dataclass(frozen=True, slots=True)
class Claimed:
    """The slot a put has claimed for the ``number``-th of its chunks. ``version``: of the slot's
    pages, see `lending`; it may have none yet."""

    number: int
    slot: int
    version: int


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied, as the caller has hashed it: xxh3_64 of each piece of the region, in order;
    and of a whole chunk in host memory its `checksum`."""

    sums: Sequence[int] | Sums
    payload_sum: bytes | None = None


Copy = Callable[[SlotFile, Sequence[Claimed]], "Sequence[Copied | None]"]
"""Copies chunks to their slots in a file of the memory tier; None for one that has no room there.
What it hashes is the source, never the copy."""


def put_batch(
    store: Store,
    putting: Putting,
    refs: Sequence[ChunkRef],
    numbers: Sequence[int],
    copy: Copy,
    roi: Roi,
    labels: Labels,
    deadline_s: float,
) -> list[PutState]:
    """Store those chunks of a put, or regions of them, in the memory tier: one transaction to claim
    slots, the copies, one to commit. Whatever fails, no claim is left behind; where not even that
    can be written, the keeper finds the claim when its time is over."""
    layout = putting.layout
    quota = store.quotas.of(MEMORY)
    pieces = layout.piece_indices(roi)
    wanted = [refs[number] for number in numbers]
    begun: list[tuple[PutState, int]] = []
    claimed: list[tuple[int, Claimed]] = []  # by their place in this batch
    ended = False

    def begin(txn: Txn) -> None:
        begun[:] = putting.begin(txn, wanted, pieces, quota, time.time())
        claimed[:] = [
            (i, Claimed(numbers[i], slot, version_of(txn, layout.slot_bytes, slot)))
            for i, (state, slot) in enumerate(begun)
            if state is PutState.WRITING
        ]
        reached("put.claiming")

    def abandon(txn: Txn, failed: Container[int]) -> None:  # in the lane: then it is known
        putting.abandon(txn, [(wanted[i], one.slot) for i, one in claimed if i in failed])

    try:
        store.live.write(begin, deadline_s)
        reached("put.claimed")
        states = [state for state, _ in begun]
        exist = [ref for ref, state in zip(wanted, states, strict=True) if state is PutState.EXISTS]
        _note_rowless(store, putting, exist)
        parts: dict[int, Part] = {}
        if claimed:
            copied = _copy(store, layout, [one for _, one in claimed], copy)
            for (i, one), sums in zip(claimed, copied, strict=True):
                part = None
                if sums is not None:
                    part = _part(store, layout, wanted[i], one.slot, sums, roi, pieces)
                if part is None:
                    states[i] = PutState.FULL
                else:
                    parts[i] = part
        reached("put.copied")
        filled = list(parts)
        done = []
        if filled:
            done = _finish(store, putting, [parts[i] for i in filled], labels, deadline_s)
        ended = True
        reached("put.finished")
    finally:
        if not ended:
            # Whether the write that failed was made or not: the lane keeps the order, and what is
            # abandoned twice is abandoned.
            with suppress(StoreError):
                store.live.submit(partial(abandon, failed=range(len(wanted))))
        putting.ended((wanted[i].key, one.slot) for i, one in claimed)
    for i, state in zip(filled, done, strict=True):
        states[i] = state
    failed = {i for i, state in enumerate(states) if state is PutState.FULL}
    if failed:
        store.live.write(partial(abandon, failed=failed), deadline_s)
    if store.has_disk:
        store.keeper.spill([wanted[i].key for i in parts if states[i] is PutState.STORED])
    return states


def version_of(txn: Txn, slot_bytes: int, slot: int) -> int:
    """That of a memory slot's pages: how often its space has been given back, see `lending`."""
    return txn.get_int("punched", pack_address(MEMORY, slot_bytes, slot))


def versions_of(txn: Txn, slot_bytes: int, slots: Sequence[int]) -> list[int]:
    """The same of many, in a transaction that only reads."""
    addresses = [pack_address(MEMORY, slot_bytes, slot) for slot in slots]
    found = txn.get_many("punched", sorted(addresses))
    return [int.from_bytes(found.get(address, b""), "little") for address in addresses]


def _copy(
    store: Store, layout: Layout, claimed: Sequence[Claimed], copy: Copy
) -> Sequence[Copied | None]:
    try:
        return copy(store.file_of(MEMORY, layout.slot_bytes), claimed)
    except OSError:  # the file system of memory_dir is full, or no file can be opened
        return [None] * len(claimed)


def _part(
    store: Store,
    layout: Layout,
    ref: ChunkRef,
    slot: int,
    copied: Copied,
    roi: Roi,
    pieces: Sequence[int],
) -> Part | None:
    """What was copied, for the commit; None if there is no room for the trailer of a whole chunk.
    Others' chunks get theirs when all parts are there."""
    if roi != layout.whole:
        return Part(ref, slot, pieces, copied.sums)
    trailer = layout.trailer(ref.key, pack_sums(copied.sums))
    try:
        file = store.file_of(MEMORY, layout.slot_bytes)
        file.write(slot, layout.padded(trailer), layout.payload_bytes)
    except OSError:
        return None
    return Part(ref, slot, pieces, copied.sums, copied.payload_sum, trailer)


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


def from_buffers(store: Store, layout: Layout, buffers: Sequence[Buffer], roi: Roi) -> Copy:
    """For bytes in host memory; ``buffers[n]`` are those of chunk n of the put."""

    def copy(file: SlotFile, claimed: Sequence[Claimed]) -> list[Copied | None]:
        copied: list[Copied | None] = [None] * len(claimed)

        def one(i: int) -> None:
            with suppress(OSError):  # no room
                copied[i] = fill(file, layout, claimed[i].slot, buffers[claimed[i].number], roi)

        # Writes to one file wait for each other; a helper hashes meanwhile. More only get in the
        # way (measured on 16 cores).
        helpers = min(1, len(claimed) * layout.roi_bytes(roi) // config.HELPER_BYTES)
        share_out(len(claimed), one, store.helpers, helpers)
        return copied

    return copy


def fill(file: SlotFile, layout: Layout, slot: int, buffer: Buffer, roi: Roi) -> Copied:
    """Copy one region into its slot. Raises OSError."""
    source = memoryview(buffer).cast("B")
    for run in layout.runs(roi):
        file.write(slot, run.in_buffer(source), run.slot_offset)
    whole = roi == layout.whole
    return Copied(layout.piece_sums(source), checksum(source) if whole else None)
