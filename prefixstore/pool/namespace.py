"""The part of a pool that belongs to one model: see `namespace.Namespace`, whose methods these are.

A get that fails is a miss; everything else raises RemoteError when no part of the engine can be
asked. Of an engine that lost a part of its servers only their chunks are missing. A chunk whose
bytes are not what its trailer says is dropped and is a miss.

What an engine cannot do: pins and leases hold nothing here, since it evicts as it was told to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prefixstore import config
from prefixstore.client.answers import buffer_bytes
from prefixstore.errors import LayoutError, RemoteError
from prefixstore.found import REMOTE, Lease, Match
from prefixstore.identity import ModelIdentity
from prefixstore.keys import KEY_BYTES, ChunkRef, KeyChain, MultimodalItem, Tokens, key_of
from prefixstore.layout import Buffer, Roi
from prefixstore.namespace import MISS
from prefixstore.pool import parts
from prefixstore.pool.backend import ABSENT, LOST, Get, Put, Written
from prefixstore.pool.objects import Shape, make_trailer, read_trailer
from prefixstore.putting import Labels, PutState, labels_for
from prefixstore.segments import MIN_SEGMENT_TOKENS, Segment
from prefixstore.serve.limits import ITEMS_BYTES_MAX

if TYPE_CHECKING:
    from prefixstore.pool.store import PooledStore

logger = logging.getLogger("prefixstore")
BATCH_BYTES = 32 << 20  # of KV in one call of the backend
RATE_MIN_BYTES_S = 64 << 20  # a transfer may take so much longer than a call
ASKED_FIRST = 512  # chunks of a prompt that are asked for at once; then four times more
_STATES = {
    Written.YES: PutState.STORED,
    Written.THERE: PutState.EXISTS,
    Written.FULL: PutState.FULL,
    Written.NO: PutState.LOST,
}


class _Reading:
    """A region of one chunk that is read: what of which object, and whether that is right."""

    def __init__(self, ns: PooledNamespace, ref: ChunkRef, out: memoryview, roi: Roi) -> None:
        self.ref = ref
        self.good = self.damaged = False
        self._ns, self._out, self._roi = ns, out, roi
        self._trailer = memoryview(bytearray(ns.shape.trailer_bytes(ref)))
        cuts: dict[str, list[tuple[int, memoryview]]] = {}
        for run in ns.layout.runs(roi):
            for name, cut in ns.shape.cut(ref.key, run.slot_offset, run.in_buffer(out)):
                cuts.setdefault(name, []).append(cut)
        last = cuts.pop(ns.shape.object_of(ref.key), [])
        self._wanted = [sum(view.nbytes for _, view in found) for found in cuts.values()]
        self._wanted.append(sum(view.nbytes for _, view in last))
        last.append((ns.shape.last_bytes, self._trailer))
        self.gets = [Get(name, found) for name, found in cuts.items()]
        self.gets.append(Get(ns.shape.object_of(ref.key), last))

    def check(self, came: Sequence[int]) -> None:
        """Judge what has come of each get."""
        if LOST in came or came[-1] == ABSENT:
            return
        ns, trailer = self._ns, self._trailer[: max(0, came[-1] - self._wanted[-1])]
        if all(count >= least for count, least in zip(came, self._wanted, strict=True)):
            found = read_trailer(trailer, ns.shape, ns.name, self.ref)
            self.good = found is not None and found.vouches_for(self._out, ns.layout, self._roi)
        self.damaged = not self.good


class PooledNamespace:
    """See the module docstring. Thread-safe."""

    def __init__(self, store: PooledStore, identity: ModelIdentity, shape: Shape) -> None:
        self.store, self.identity, self.shape = store, identity, shape
        self.layout, self.name = shape.layout, identity.namespace
        self.backend = store.backend

    def chain(
        self, tokens: Tokens = (), salt: bytes = b"", items: Sequence[MultimodalItem] = ()
    ) -> KeyChain:
        """The keys of a prompt in this namespace."""
        return KeyChain(self.name, self.layout.chunk_tokens, tokens, salt, items)

    # ------------------------------------------------------------------ match
    def match(self, refs: Sequence[ChunkRef] | KeyChain) -> Match:
        """Find how many leading chunks are there. Raises RemoteError."""
        keys = refs.keys if isinstance(refs, KeyChain) else _honest(refs)
        found, at, size = 0, 0, ASKED_FIRST
        while at == found < len(keys):
            block = keys[at : at + size]
            there = self._exist(block)
            found += there.index(False) if False in there else len(there)
            at, size = at + len(block), 4 * size
        return Match((REMOTE,) * found, self.layout.chunk_tokens)

    def match_each(self, refs: Sequence[ChunkRef]) -> list[int]:
        """Which chunks are there: REMOTE or MISS for each. Raises RemoteError."""
        return [REMOTE if there else MISS for there in self._exist(_honest(refs))]

    def _exist(self, keys: Sequence[bytes | None]) -> list[bool]:
        """Which keys have chunks; None has none."""
        names = [self.shape.object_of(key) for key in keys if key is not None]
        there = iter(self.backend.exist(names, deadline_s=self.store.deadline_s))
        return [key is not None and next(there) for key in keys]

    def find_segments(
        self,
        tokens: Tokens,
        salt: bytes = b"",
        start: int = 0,
        min_tokens: int = MIN_SEGMENT_TOKENS,
        items: Sequence[MultimodalItem] = (),
    ) -> list[Segment]:
        """Runs of the prompt's tokens that stand in a stored text."""
        return []

    def lease(
        self, refs: Sequence[ChunkRef], tiers: Sequence[int], duration_s: float = config.LEASE_S
    ) -> tuple[Lease, int]:
        """How many leading chunks are still there; nothing holds them. Raises RemoteError."""
        return Lease(b"", time.time()), self.match(refs).num_chunks

    def release(self, lease: Lease) -> None:
        """There is nothing to release."""

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
        """Store chunks, or a region of each: see `namespace.Namespace.put`. ``pin`` and ``wait``
        change nothing. Raises LayoutError, RemoteError."""
        labels = labels_for(ttl_s, tag, pin, alone)
        views = [memoryview(one).cast("B") for one in buffers]
        size = buffer_bytes(self.layout, refs, views, roi)
        end = time.monotonic() + deadline_s + len(refs) * size / RATE_MIN_BYTES_S
        part = None if roi is None or roi == self.layout.whole else roi
        self.store.name_models()
        states: list[PutState] = []
        for at, stop in _batches(len(refs), size):
            left = max(0.0, end - time.monotonic())
            batch = refs[at:stop], views[at:stop], labels, left
            states += self.write(*batch) if part is None else parts.write(self, part, group, *batch)
        return states

    def write(
        self,
        refs: Sequence[ChunkRef],
        payloads: Sequence[memoryview],
        labels: Labels,
        deadline_s: float,
    ) -> list[PutState]:
        """Write whole chunks that are not there, in one go. Raises RemoteError."""
        end = time.monotonic() + deadline_s
        there = self._exist(_honest(refs))
        seen: set[bytes] = set()
        states = [PutState.EXISTS] * len(refs)
        new = []
        for i, ref in enumerate(refs):
            if not there[i] and ref.key not in seen:
                seen.add(ref.key)
                new.append(i)
        least = KEY_BYTES + 4 * self.layout.chunk_tokens
        for i in list(new):
            # Who forges a key, or keeps a book in a preimage, stores nothing.
            if not _is_honest(refs[i]):
                raise LayoutError(
                    "a key that is not the hash of its preimage", "see docs/format.md"
                )
            if not least <= len(refs[i].preimage) <= least + ITEMS_BYTES_MAX:
                raise LayoutError(f"a preimage of {len(refs[i].preimage)} bytes")
        ttl_s = max(0.001, labels.expires_s - time.time()) if labels.expires_s else None
        failed = self._write_parts(refs, payloads, new, ttl_s, end)
        new = [i for i in new if i not in failed]
        heads = [
            Put(
                self.shape.object_of(refs[i].key),
                [
                    payloads[i][self.shape.last_start :],
                    make_trailer(self.shape, refs[i], self.name, payloads[i], labels),
                ],
            )
            for i in new
        ]
        done = self.backend.put(heads, ttl_s=ttl_s, deadline_s=end - time.monotonic())
        for i, written in zip(new, done, strict=True):
            states[i] = _STATES[written]
        for i, written in failed.items():
            states[i] = _STATES[written]
        return states

    def _write_parts(
        self,
        refs: Sequence[ChunkRef],
        payloads: Sequence[memoryview],
        which: Sequence[int],
        ttl_s: float | None,
        end: float,
    ) -> dict[int, Written]:
        """Write what goes before the last part; the chunks of which that failed."""
        shape, puts, owners = self.shape, [], []
        for i in which:
            for number in range(shape.num_parts):
                start = number * shape.part_bytes
                cut = payloads[i][start : start + shape.part_bytes]
                puts.append(Put(shape.part_of(refs[i].key, number), [cut]))
                owners.append(i)
        done = self.backend.put(puts, ttl_s=ttl_s, replace=True, deadline_s=end - time.monotonic())
        return {i: one for i, one in zip(owners, done, strict=True) if one is not Written.YES}

    # ------------------------------------------------------------------ get
    def get(
        self,
        refs: Sequence[ChunkRef],
        outs: Sequence[memoryview],
        roi: Roi | None = None,
        progress: Callable[[], None] | None = None,
    ) -> list[int]:
        """Read chunks, or a region of each, into the caller's buffers.

        Returns REMOTE or MISS for each; a miss leaves garbage. Raises LayoutError only.
        """
        size = buffer_bytes(self.layout, refs, outs, roi, writable=True)
        roi = roi or self.layout.whole
        end = time.monotonic() + self.store.deadline_s + len(refs) * size / RATE_MIN_BYTES_S
        tiers = [MISS] * len(refs)
        # Of a forged reference nothing is read: what is stored would look damaged beside it.
        asked = [i for i, ref in enumerate(refs) if not ref.preimage or _is_honest(ref)]
        for at, stop in _batches(len(asked), size):
            which = asked[at:stop]
            views = [outs[i].cast("B") for i in which]
            left = max(0.0, end - time.monotonic())
            try:
                found = self._get([refs[i] for i in which], views, roi, left)
            except RemoteError:
                break
            for i, tier in zip(which, found, strict=True):
                tiers[i] = tier
            if progress is not None:
                progress()
        return tiers

    def _get(
        self, refs: Sequence[ChunkRef], outs: Sequence[memoryview], roi: Roi, deadline_s: float
    ) -> list[int]:
        readings = [_Reading(self, ref, out, roi) for ref, out in zip(refs, outs, strict=True)]
        gets = [get for reading in readings for get in reading.gets]
        counts = iter(self.backend.get(gets, deadline_s=deadline_s))
        for reading in readings:
            reading.check([next(counts) for _ in reading.gets])
        damaged = [reading.ref for reading in readings if reading.damaged]
        if damaged:
            logger.warning("prefixstore: %d damaged chunks in %s", len(damaged), self.backend.url)
            self.store.count("damaged", len(damaged))
            self._remove(damaged, deadline_s)
        return [REMOTE if reading.good else MISS for reading in readings]

    # ------------------------------------------------------------------ the rest
    def delete(self, refs: Sequence[ChunkRef]) -> int:
        """Remove chunks; how many were there. Raises RemoteError."""
        return self._remove(refs, self.store.deadline_s)

    def _remove(self, refs: Sequence[ChunkRef], deadline_s: float) -> int:
        end = time.monotonic() + deadline_s
        names = [self.shape.names_of(key) for key in dict.fromkeys(ref.key for ref in refs)]
        # The object that says the others are there goes first.
        there = self.backend.delete([first for first, *_ in names], deadline_s=deadline_s)
        others = [name for _, *rest in names for name in rest]
        if others:
            self.backend.delete(others, deadline_s=end - time.monotonic())
        return sum(there)

    def note_staleness(
        self, refs: Sequence[ChunkRef], values: npt.NDArray[np.floating[Any]]
    ) -> int:
        """Keep how far the KV of each token moves behind other texts: [chunks, tokens]."""
        return 0

    def staleness_of(self, refs: Sequence[ChunkRef]) -> list[npt.NDArray[np.float16] | None]:
        """What was noted of each chunk: float16 [tokens], or None. Raises RemoteError."""
        return [None] * len(refs)


def _is_honest(ref: ChunkRef) -> bool:
    return key_of(ref.preimage) == ref.key


def _honest(refs: Sequence[ChunkRef]) -> list[bytes | None]:
    """Keys that are the hash of what they say, others as None: what is stored is always honest."""
    return [ref.key if _is_honest(ref) else None for ref in refs]


def _batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    step = max(1, BATCH_BYTES // size)
    for at in range(0, count, step):
        yield at, min(count, at + step)
