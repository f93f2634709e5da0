"""One model identity's part of a store: match, put, get, lease.

What must hold: ``get`` gives the bytes that were put under that key, bit for bit, or nothing. It
checks what it has copied, not what it is about to copy, so a slot that is evicted and reused in the
middle of a copy is a miss like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prefixstore import config, lifetime, owned, retiring, staleness
from prefixstore.errors import LayoutError, StoreTimeoutError
from prefixstore.filling import Copy, from_buffers, put_batch
from prefixstore.found import Lease as Lease
from prefixstore.found import Match as Match
from prefixstore.getting import MISS as MISS
from prefixstore.getting import get_by
from prefixstore.healing import Suspect
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef, KeyChain, MultimodalItem, Tokens
from prefixstore.layout import Buffer, Roi
from prefixstore.leases import lease_chunks, release
from prefixstore.ledger import DISK, MEMORY
from prefixstore.putting import Labels, PutState, Putting, check_numbers, labels_for
from prefixstore.reading import read_checked
from prefixstore.registry import NamespaceRecord
from prefixstore.rows import Row, usable_rows
from prefixstore.segments import MIN_SEGMENT_TOKENS, Segment, find_segments
from prefixstore.slots import SlotFile

if TYPE_CHECKING:
    from prefixstore.store import Store

_FIRST_BLOCK = 16  # keys of a match looked up before the first is compared; then four times more


class Namespace:
    """See the module docstring. Thread-safe. Buffers are contiguous bytes in canonical order."""

    def __init__(self, store: Store, record: NamespaceRecord) -> None:
        self.store = store
        self.identity, self.layout = record.identity, record.layout
        self.name = record.identity.namespace  # kept: computing it takes as long as many look-ups

    def chain(
        self, tokens: Tokens = (), salt: bytes = b"", items: Sequence[MultimodalItem] = ()
    ) -> KeyChain:
        """The keys of a prompt in this namespace."""
        return KeyChain(self.name, self.layout.chunk_tokens, tokens, salt, items)

    # ------------------------------------------------------------------ match
    def match(self, refs: Sequence[ChunkRef] | KeyChain) -> Match:
        """Find how many leading chunks are stored, and where. Lock-free; reads two indexes.

        A hit compares the whole preimage: parent key, token ids, multimodal items.
        """
        self.store.check_open(self.name)
        if isinstance(refs, KeyChain):
            keys, preimages = refs.keys, refs.preimages
        else:
            keys, preimages = [r.key for r in refs], [r.preimage for r in refs]
        tiers: list[int] = []
        now_s = int(time.time())
        at, size = 0, _FIRST_BLOCK
        with self.store.live.lookup("chunk") as in_memory, self.store.index.lookup("chunk") as disk:
            while at == len(tiers) < len(keys):
                block = slice(at, at + size)
                rows = list(map(in_memory, keys[block]))
                found = [DISK if row is None else MEMORY for row in rows]
                if DISK in found:
                    rows = [
                        disk(key) if row is None else row
                        for key, row in zip(keys[block], rows, strict=True)
                    ]
                usable = usable_rows(rows, preimages[block], self.name, now_s)
                tiers += found[:usable]
                if usable < len(rows) and (row := rows[usable]) is not None:
                    nth = at + usable
                    self.suspect(found[usable], keys[nth], preimages[nth], row)
                at, size = at + len(rows), 4 * size
        return Match(tuple(tiers), self.layout.chunk_tokens)

    def match_each(self, refs: Sequence[ChunkRef]) -> list[int]:
        """Find which chunks are stored, whatever is before them: the tier of each, or MISS."""
        self.store.check_open(self.name)
        now_s = int(time.time())
        tiers = [MISS] * len(refs)
        with self.store.live.lookup("chunk") as in_memory, self.store.index.lookup("chunk") as disk:
            for i, ref in enumerate(refs):
                for tier, lookup in ((MEMORY, in_memory), (DISK, disk)):
                    row = lookup(ref.key)
                    if row is not None:
                        if usable_rows([row], [ref.preimage], self.name, now_s):
                            tiers[i] = tier
                        else:
                            self.suspect(tier, ref.key, ref.preimage, row)
                        break
        return tiers

    def suspect(self, tier: int, key: bytes, preimage: bytes, row: bytes) -> None:
        """It is there and cannot be used: the keeper finds out why, and heals it if need be."""
        self.store.keeper.suspects.note(Suspect(tier, key, row, self.name, preimage))

    def find_segments(
        self,
        tokens: Tokens,
        salt: bytes = b"",
        start: int = 0,
        min_tokens: int = MIN_SEGMENT_TOKENS,
        items: Sequence[MultimodalItem] = (),
    ) -> list[Segment]:
        """Find runs of at least ``min_tokens`` tokens that stand somewhere in a stored text.

        At any place of either, from token ``start`` of the prompt on (what `match` found is before
        it); none overlap, all are in order. Texts encoded alone are preferred, then longer runs.
        Each token was compared. Lock-free; searches what is on disk if the store has a disk. Raises
        ConfigError for ``min_tokens`` below MIN_SEGMENT_TOKENS, StoreClosedError.
        """
        return find_segments(self, tokens, salt, start, min_tokens, items)

    def lease(
        self,
        refs: Sequence[ChunkRef],
        tiers: Sequence[int],
        duration_s: float = config.LEASE_S,
        wait: bool = True,
    ) -> tuple[Lease, int]:
        """Hold chunks that `match` found. Returns the lease and how many leading ones it holds.

        Without ``wait`` it is asked for, if that can be, and said to hold all. A chunk that goes
        before its turn among this process's writes is found missing, or changed, when it is read.
        """
        store, lease_id = self.store, self.store.new_lease_id()
        end_s = time.time() + min(duration_s, config.LEASE_S)
        wanted = [(tier, ref.key) for ref, tier in zip(refs, tiers, strict=True)]

        def grant(txn: Txn) -> list[bool]:
            return lease_chunks(store.ledger, txn, lease_id, end_s, wanted, self.name)

        if not wait:
            try:
                return Lease(lease_id, end_s, store.live.submit(grant)), len(refs)
            except StoreTimeoutError:  # too many wait: it would help, no more
                return Lease(b"", end_s), len(refs)
        granted = store.live.write(grant)
        held = granted.index(False) if False in granted else len(granted)
        return Lease(lease_id, end_s), held

    def release(self, lease: Lease) -> None:
        """End a lease. Does not wait: nothing depends on when it takes effect."""
        if not lease.lease_id or (lease.granting is not None and lease.granting.cancel()):
            return  # it was not asked for, or had not begun
        self.store.live.submit(lambda txn: release(self.store.ledger, txn, lease.lease_id))

    # ------------------------------------------------------------------ how long it is kept
    def delete(self, refs: Sequence[ChunkRef]) -> int:
        """See `owned.delete`."""
        return owned.delete(self, refs)

    def set_ttl(self, refs: Sequence[ChunkRef], ttl_s: float | None) -> int:
        """See `lifetime.set_ttl`."""
        return lifetime.set_ttl(self, refs, ttl_s)

    def retire(self) -> int:
        """See `retiring.retire`."""
        return retiring.retire(self)

    def bump(self) -> Namespace:
        """See `retiring.bump`."""
        return retiring.bump(self)[0]

    def note_staleness(
        self, refs: Sequence[ChunkRef], values: npt.NDArray[np.floating[Any]]
    ) -> int:
        """See `staleness.note_staleness`."""
        return staleness.note_staleness(self, refs, values)

    def staleness_of(self, refs: Sequence[ChunkRef]) -> list[npt.NDArray[np.float16] | None]:
        """See `staleness.staleness_of`."""
        return staleness.staleness_of(self, refs)

    # ------------------------------------------------------------------ put
    def put(
        self,
        refs: Sequence[ChunkRef],
        buffers: Sequence[Buffer],
        *,
        roi: Roi | None = None,
        group: int = 0,
        ttl_s: float | None = None,
        tag: str = "",
        pin: bool = False,
        alone: bool = False,
        wait: bool = True,
        deadline_s: float = config.OP_DEADLINE_S,
    ) -> list[PutState]:
        """Store chunks, or this rank's region of them; ``buffers[i]`` holds ``refs[i]``'s bytes.

        They are in the memory tier, for every process of the host, when this returns, and on disk
        soon after (`Store.flush` waits for that). ``group`` names the engine: its ranks complete
        each other's chunks. While the tier is full of chunks not yet on disk, ``wait`` until there
        is room, or do not store them. ``alone``: the text was encoded by itself, behind no other
        prompt's tokens, which makes it the better source of segments. Raises LayoutError,
        ConfigError, StoreTimeoutError, StoreClosedError.
        """
        layout = self.layout
        roi = roi or layout.whole
        layout.check(roi)
        size = layout.roi_bytes(roi)
        if len(buffers) != len(refs):
            raise LayoutError(f"{len(buffers)} buffers for {len(refs)} chunks", "give one for each")
        for buffer in buffers:
            if memoryview(buffer).nbytes != size:
                raise LayoutError(
                    f"a buffer of {memoryview(buffer).nbytes} bytes", f"{size} needed"
                )
        copy = from_buffers(self.store, layout, buffers, roi)
        labels = labels_for(ttl_s, tag, pin, alone)
        return self.put_by(refs, copy, roi, labels, group, wait, deadline_s)

    def put_by(
        self,
        refs: Sequence[ChunkRef],
        copy: Copy,
        roi: Roi,
        labels: Labels,
        group: int = 0,
        wait: bool = True,
        deadline_s: float = config.OP_DEADLINE_S,
    ) -> list[PutState]:
        """`put` for a caller that copies to the slots itself, as a GPU does by DMA."""
        store, layout = self.store, self.layout
        store.check_open(self.name)
        layout.check(roi)
        check_numbers(refs, group)
        putting = Putting(store.ledger, layout, self.name, group, store.has_disk)
        put = partial(
            put_batch, store, putting, refs, copy=copy, roi=roi, labels=labels,
            deadline_s=deadline_s,
        )  # fmt: skip
        states: list[PutState] = []
        step = config.BATCH_CHUNKS_MAX
        for at in range(0, len(refs), step):
            done = put(range(at, min(at + step, len(refs))))
            full = [i for i, state in enumerate(done) if state is PutState.FULL]
            if wait and full and store.has_disk and store.drain(deadline_s):
                retried = put([at + i for i in full])
                for i, state in zip(full, retried, strict=True):
                    done[i] = state
            states += self._count_put(done)
        return states

    def _count_put(self, states: list[PutState]) -> list[PutState]:
        for state in set(states):
            self.store.keeper.count(f"put_{state.value}", states.count(state))
        return states

    # ------------------------------------------------------------------ get
    def get(
        self,
        refs: Sequence[ChunkRef],
        outs: Sequence[memoryview],
        roi: Roi | None = None,
        progress: Callable[[], None] | None = None,
    ) -> list[int]:
        """Read chunks, or a region of each, into the caller's buffers.

        Returns the tier each came from, or MISS: absent, evicted meanwhile, expired, or damaged
        (then its row is dropped, counted, and it can be stored again). A buffer of a miss holds
        garbage; no two may overlap. A ref without preimage was compared by `match`. ``progress`` is
        called in this thread each time it has read a chunk. Raises LayoutError, StoreClosedError.
        """
        layout, region = self.layout, roi or self.layout.whole

        def read(i: int, out: memoryview, file: SlotFile, row: Row) -> bool:
            return read_checked(file, layout, refs[i].key, row, out, region)

        return get_by(self, refs, outs, region, read, progress)
