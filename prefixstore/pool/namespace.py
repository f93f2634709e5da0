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
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prefixstore import config, staleness
from prefixstore.client.answers import buffer_bytes
from prefixstore.codec import AUTO, NONE
from prefixstore.codec.form import Form
from prefixstore.errors import RemoteError
from prefixstore.found import REMOTE, Lease, Match
from prefixstore.identity import ModelIdentity
from prefixstore.keys import ChunkRef, KeyChain, MultimodalItem, Tokens, is_honest
from prefixstore.layout import Buffer, Roi, checksum
from prefixstore.namespace import MISS
from prefixstore.pool import parts
from prefixstore.pool.backend import Get, Put, Written
from prefixstore.pool.choosing import Choice
from prefixstore.pool.objects import Shape
from prefixstore.pool.reading import State, read, writers_of
from prefixstore.pool.writing import write
from prefixstore.putting import PutState, labels_for
from prefixstore.segments import MIN_SEGMENT_TOKENS, Question, Segment

if TYPE_CHECKING:
    from prefixstore.pool.store import PooledStore

logger = logging.getLogger("prefixstore")
BATCH_BYTES = 32 << 20  # of KV in one call of the backend
RATE_MIN_BYTES_S = 64 << 20  # a transfer may take so much longer than a call
ASKED_FIRST = 512  # chunks of a prompt that are asked for at once; then four times more
_SUM_BYTES = 16
_LOOK_S = 0.01


class PooledNamespace:
    """See the module docstring. Thread-safe."""

    def __init__(self, store: PooledStore, identity: ModelIdentity, shape: Shape) -> None:
        self.store, self.identity, self.shape = store, identity, shape
        self.layout, self.name = shape.layout, identity.namespace
        self.backend = store.backend
        self.form = Form(shape.layout, identity.kv_dtype)
        self.choice = Choice(store.codec)
        # Whether chunks that were met are coded (`reading`).
        self.meets_coded = self.choice.codec not in (NONE, AUTO)

    def chain(
        self, tokens: Tokens = (), salt: bytes = b"", items: Sequence[MultimodalItem] = ()
    ) -> KeyChain:
        """The keys of a prompt in this namespace."""
        return KeyChain(self.name, self.layout.chunk_tokens, tokens, salt, items)

    # ------------------------------------------------------------------ match
    def match(self, refs: Sequence[ChunkRef] | KeyChain) -> Match:
        """Find how many leading chunks are there. Raises RemoteError."""
        keys = _leading(refs.keys if isinstance(refs, KeyChain) else _honest(refs))
        may = self.store.scout.may_have(self.name, keys)
        if may is not None and False in may:
            keys = keys[: may.index(False)]
        found, at, size = 0, 0, ASKED_FIRST
        while at == found < len(keys):
            block = keys[at : at + size]
            there = self.exist(block)
            found += there.index(False) if False in there else len(there)
            at, size = at + len(block), 4 * size
        return Match((REMOTE,) * found, self.layout.chunk_tokens)

    def match_each(self, refs: Sequence[ChunkRef]) -> list[int]:
        """Which chunks are there: REMOTE or MISS for each. Raises RemoteError."""
        keys = _honest(refs)
        asked = [key for key in keys if key is not None]
        may = self.store.scout.may_have(self.name, asked)
        if may is not None:
            asked = [key for key, there in zip(asked, may, strict=True) if there]
        there = dict(zip(asked, self.exist(asked), strict=True))
        return [REMOTE if key is not None and there.get(key) else MISS for key in keys]

    def exist(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys have chunks; the engine is asked. Raises RemoteError."""
        names = [self.shape.object_of(key) for key in keys]
        return self.backend.exist(names, deadline_s=self.store.deadline_s)

    def find_segments(
        self,
        tokens: Tokens,
        salt: bytes = b"",
        start: int = 0,
        min_tokens: int = MIN_SEGMENT_TOKENS,
        items: Sequence[MultimodalItem] = (),
    ) -> list[Segment]:
        """Runs of the prompt's tokens that stand in a stored text, of those that this process has
        found out about (`scout`); a patient store waits for all that are there. Raises ConfigError,
        RemoteError."""
        mirror = self.store.scout.mirror(self)
        end = time.monotonic() + self.store.patience_s
        while (mirror is None or not mirror.is_complete) and time.monotonic() < end:
            time.sleep(_LOOK_S)
            mirror = self.store.scout.mirror(self)
        if mirror is None:
            return []
        return mirror.find(
            Question(self.name, self.layout.chunk_tokens, tokens, salt, start, min_tokens, items)
        )

    def lease(
        self,
        refs: Sequence[ChunkRef],
        tiers: Sequence[int],
        duration_s: float = config.LEASE_S,
        wait: bool = True,
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
            states += (
                write(self, *batch) if part is None else parts.write(self, part, group, *batch)
            )
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

        Returns REMOTE or MISS for each; a miss leaves garbage. Raises LayoutError only.
        """
        size = buffer_bytes(self.layout, refs, outs, roi, writable=True)
        roi = roi or self.layout.whole
        end = time.monotonic() + self.store.deadline_s + len(refs) * size / RATE_MIN_BYTES_S
        tiers = [MISS] * len(refs)
        # Of a forged reference nothing is read: what is stored would look damaged beside it.
        asked = [i for i, ref in enumerate(refs) if not ref.preimage or is_honest(ref)]
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
        states = read(self, refs, outs, roi, deadline_s)
        damaged = [ref for ref, one in zip(refs, states, strict=True) if one is State.DAMAGED]
        if damaged:
            logger.warning("prefixstore: %d damaged chunks in %s", len(damaged), self.backend.url)
            self.store.count("damaged", len(damaged))
            self._remove(damaged, deadline_s)
        return [REMOTE if one is State.GOOD else MISS for one in states]

    # ------------------------------------------------------------------ the rest
    def delete(self, refs: Sequence[ChunkRef]) -> int:
        """Remove chunks; how many were there. Raises RemoteError."""
        return self._remove(refs, self.store.deadline_s)

    def _remove(self, refs: Sequence[ChunkRef], deadline_s: float) -> int:
        end = time.monotonic() + deadline_s
        keys = list(dict.fromkeys(ref.key for ref in refs))
        writers = writers_of(self, refs, end)
        names = [self.shape.by(writers.get(key, 0)).names_of(key) for key in keys]
        # The object that says the others are there goes first.
        there = self.backend.delete(
            [first for first, *_ in names], deadline_s=end - time.monotonic()
        )
        others = [name for _, *rest in names for name in rest]
        self.backend.delete(others, deadline_s=end - time.monotonic())
        self.store.removed(self.name, keys)
        return sum(there)

    def note_staleness(
        self, refs: Sequence[ChunkRef], values: npt.NDArray[np.floating[Any]]
    ) -> int:
        """Keep how far the KV of each token moves behind other texts: [chunks, tokens]. Raises
        LayoutError, RemoteError."""
        data = staleness.rows_of(refs, values, self.layout.chunk_tokens)
        there = self.exist([ref.key for ref in refs])
        puts = [
            Put(self.shape.staleness_of(ref.key), [checksum(ref.key + row), row])
            for ref, row, found in zip(refs, data, there, strict=True)
            if found
        ]
        done = self.backend.put(puts, replace=True, deadline_s=self.store.deadline_s)
        return done.count(Written.YES)

    def staleness_of(self, refs: Sequence[ChunkRef]) -> list[npt.NDArray[np.float16] | None]:
        """What was noted of each chunk: float16 [tokens], or None. Raises RemoteError."""
        size = _SUM_BYTES + 2 * self.layout.chunk_tokens
        outs = [memoryview(bytearray(size)) for _ in refs]
        gets = [
            Get(self.shape.staleness_of(ref.key), [(0, out)])
            for ref, out in zip(refs, outs, strict=True)
        ]
        came = self.backend.get(gets, deadline_s=self.store.deadline_s)
        return [
            np.frombuffer(out[_SUM_BYTES:], "<f2")
            if count == size and checksum(ref.key + out[_SUM_BYTES:]) == out[:_SUM_BYTES]
            else None
            for ref, out, count in zip(refs, outs, came, strict=True)
        ]


def _honest(refs: Sequence[ChunkRef]) -> list[bytes | None]:
    """Keys that are the hash of what they say, others as None: what is stored is always honest."""
    return [ref.key if is_honest(ref) else None for ref in refs]


def _leading(keys: Sequence[bytes | None]) -> list[bytes]:
    """Those before the first that is none."""
    return [key for key in takewhile(lambda key: key is not None, keys) if key is not None]


def _batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    step = max(1, BATCH_BYTES // size)
    for at in range(0, count, step):
        yield at, min(count, at + step)
